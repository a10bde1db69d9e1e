//! What the host adds to a policy. Read once for each load, so that compiling
//! stays a pure function.

use super::launchers::Launchers;
use super::resolvers::HostDns;

#[derive(Clone, Debug, Default)]
pub struct Host {
    pub launchers: Launchers,
    pub dns: HostDns,
}
