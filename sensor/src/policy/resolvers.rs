//! Which resolvers a host asks, and by which domains it completes names: its
//! resolv.conf, if only root (or systemd-resolved, in its own directory) can
//! have written it. Whoever chooses the resolver chooses what names mean.

use super::names::NamePattern;
use super::parse::{MAX_RESOLVERS, MAX_SEARCH};
use sensor_common::addr::Addr;
use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

pub const RESOLV_CONF: &str = "/etc/resolv.conf";
const MAX_BYTES: usize = 64 << 10;
/// Where systemd-resolved keeps what resolv.conf links to, as its own user.
const RESOLVED_DIRECTORY: &str = "/run/systemd/resolve";
const RESOLVED_USER: &str = "systemd-resolve";
/// As the kernel follows (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// What a host says about DNS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDns {
    pub resolvers: Vec<IpAddr>,
    pub search: Vec<String>,
    /// Why it says nothing.
    pub problem: Option<String>,
    /// What was read: a change of it is a change of the policy.
    pub files: Vec<PathBuf>,
}

/// Looks at this host.
pub fn discover() -> HostDns {
    let resolved = nix::unistd::User::from_name(RESOLVED_USER).ok().flatten().map(|user| user.uid.as_raw());
    let (files, text) = match trusted(Path::new(RESOLV_CONF), &on_disk, resolved) {
        Ok(real) => {
            let text = super::load::read_regular(&real, MAX_BYTES);
            (vec![PathBuf::from(RESOLV_CONF), real], text)
        }
        Err(why) => (vec![PathBuf::from(RESOLV_CONF)], Err(why)),
    };
    match text {
        Ok(bytes) => {
            let host = nix::unistd::gethostname().unwrap_or_default();
            HostDns { files, ..parse(&bytes, &host.to_string_lossy()) }
        }
        Err(why) => HostDns { problem: Some(why), files, ..HostDns::default() },
    }
}

/// The text of a resolv.conf (resolv.conf(5)). Without `search` and `domain`
/// names are completed by the host's own domain. Lines that say nothing that is
/// understood are passed over, as the C library does.
pub fn parse(bytes: &[u8], hostname: &str) -> HostDns {
    let mut dns = HostDns::default();
    let mut search: Option<Vec<&str>> = None;
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines() {
        let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
        match (line.starts_with([' ', '\t']), words.next()) {
            (false, Some("nameserver")) => {
                let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
                let ip = IpAddr::from(Addr::from(ip).normalise());
                if dns.resolvers.len() < MAX_RESOLVERS && !ip.is_multicast() && !dns.resolvers.contains(&ip) {
                    dns.resolvers.push(ip);
                }
            }
            // The last one counts.
            (false, Some("search")) => search = Some(words.collect()),
            (false, Some("domain")) => search = Some(words.take(1).collect()),
            _ => {}
        }
    }
    let own = hostname.split_once('.').map(|(_, domain)| domain);
    for domain in search.unwrap_or_else(|| own.into_iter().collect()) {
        match NamePattern::parse(domain) {
            Ok(name) if !name.below && !dns.search.contains(&name.name) && dns.search.len() < MAX_SEARCH => {
                dns.search.push(name.name);
            }
            _ => {}
        }
    }
    if dns.resolvers.is_empty() {
        dns.problem = Some(format!("{RESOLV_CONF} names no resolver"));
    }
    dns
}

/// One place on the way to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub uid: u32,
    /// As in `st_mode`.
    pub mode: u32,
    /// Where it leads to, if it is a symbolic link.
    pub link: Option<PathBuf>,
}

fn on_disk(path: &Path) -> io::Result<Place> {
    let meta = path.symlink_metadata()?;
    let link = if meta.is_symlink() { Some(path.read_link()?) } else { None };
    Ok(Place { uid: meta.uid(), mode: meta.mode(), link })
}

/// The file that an absolute path leads to, if nobody but root can put another
/// there: every directory on the way is root's and writable by root alone. In
/// its own directory `resolved` counts as root.
pub fn trusted(
    path: &Path,
    look: &dyn Fn(&Path) -> io::Result<Place>,
    resolved: Option<u32>,
) -> Result<PathBuf, String> {
    let parts = |path: &Path| -> Vec<OsString> {
        path.components()
            .rev()
            .filter(|c| !matches!(c, Component::CurDir))
            .map(|c| c.as_os_str().to_owned())
            .collect()
    };
    // What is still to be walked, the next part last.
    let mut rest = parts(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let place_path = at.join(&part);
        let place = look(&place_path).map_err(|e| format!("{}: {e}", place_path.display()))?;
        if let Some(link) = place.link {
            links += 1;
            if links > MAX_LINKS {
                return Err(format!("{}: too many symbolic links", path.display()));
            }
            // The directory that holds it was looked at; its own mode says nothing.
            rest.extend(parts(&link));
            continue;
        }
        let shown = place_path.display();
        let own = place_path.starts_with(RESOLVED_DIRECTORY) && Some(place.uid) == resolved;
        if place.uid != 0 && !own {
            return Err(format!("{shown} belongs to uid {}", place.uid));
        }
        if place.mode & 0o022 != 0 {
            return Err(format!("{shown} can be written by others than its owner"));
        }
        let kind = place.mode & libc::S_IFMT;
        if rest.is_empty() && kind != libc::S_IFREG {
            return Err(format!("{shown} is not a regular file"));
        }
        if !rest.is_empty() && kind != libc::S_IFDIR {
            return Err(format!("{shown} is not a directory"));
        }
        at = place_path;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_resolv_conf_is_read_as_the_c_library_reads_it() {
        let dns = parse(
            b"# by hand\nnameserver 10.0.0.53\nnameserver\t2001:db8::53 # second\nnameserver 10.0.0.53\n\
              nameserver fe80::1%eth0\n nameserver 10.0.0.9\nnameserver localhost\nnameserver ::ffff:10.0.0.54\n\
              nameserver 224.0.0.251\n;nameserver 10.0.0.8\n\
              domain old.example\nsearch Corp.Example. b\xc3\xbccher.example . a..b corp.example\noptions ndots:5\n",
            "host.own.example",
        );
        let ips: Vec<String> = dns.resolvers.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.0.0.53", "2001:db8::53", "10.0.0.54"]);
        assert_eq!(dns.search, ["corp.example", "xn--bcher-kva.example"]);
        assert_eq!(dns.problem, None);
    }

    #[test]
    fn without_a_search_list_the_hosts_domain_completes_names() {
        assert_eq!(parse(b"nameserver 10.0.0.53\n", "host.own.example").search, ["own.example"]);
        assert_eq!(parse(b"nameserver 10.0.0.53\n", "host").search, [""; 0]);
        assert_eq!(parse(b"search\n", "host.own.example").search, [""; 0]);
        assert_eq!(parse(b"search a.example\ndomain b.example c.example\n", "h").search, ["b.example"]);
    }

    #[test]
    fn many_and_odd_lines_are_bounded() {
        let mut text = b"\xff\xfe nameserver\n".to_vec();
        for i in 0..1000u32 {
            text.extend(format!("nameserver 10.0.{}.{}\n", i / 250, i % 250 + 1).bytes());
        }
        text.extend(b"search");
        for i in 0..1000 {
            text.extend(format!(" d{i}.example").bytes());
        }
        let dns = parse(&text, "");
        assert_eq!((dns.resolvers.len(), dns.search.len()), (MAX_RESOLVERS, MAX_SEARCH));
        assert_eq!(
            parse(b"", "h").problem.as_deref(),
            Some("/etc/resolv.conf names no resolver"),
            "the C library would ask 127.0.0.1; nobody said so"
        );
    }

    const DIR: u32 = libc::S_IFDIR | 0o755;
    const FILE: u32 = libc::S_IFREG | 0o644;

    fn asked(places: &[(&str, u32, u32, &str)]) -> Result<PathBuf, String> {
        let places: HashMap<PathBuf, Place> = places
            .iter()
            .map(|(path, uid, mode, link)| {
                let link = (!link.is_empty()).then(|| PathBuf::from(link));
                (PathBuf::from(path), Place { uid: *uid, mode: *mode, link })
            })
            .collect();
        let look = |path: &Path| places.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into());
        trusted(Path::new("/etc/resolv.conf"), &look, Some(101))
    }

    #[test]
    fn a_file_of_roots_is_trusted_with_all_that_leads_there() {
        let (root, etc) = (("/", 0, DIR, ""), ("/etc", 0, DIR, ""));
        let link = |to| ("/etc/resolv.conf", 0, 0o120777, to);
        assert_eq!(
            asked(&[root, etc, ("/etc/resolv.conf", 0, FILE, "")]),
            Ok(PathBuf::from("/etc/resolv.conf"))
        );
        for (file, why) in [
            (("/etc/resolv.conf", 1000, FILE, ""), "belongs to uid 1000"),
            (("/etc/resolv.conf", 101, FILE, ""), "belongs to uid 101"),
            (("/etc/resolv.conf", 0, FILE | 0o020, ""), "can be written by others"),
            (("/etc/resolv.conf", 0, FILE | 0o002, ""), "can be written by others"),
            (("/etc/resolv.conf", 0, DIR, ""), "not a regular file"),
            (("/etc/resolv.conf", 0, libc::S_IFIFO | 0o600, ""), "not a regular file"),
            (link("loop"), "No such file"),
            (link("resolv.conf"), "too many symbolic links"),
        ] {
            let found = asked(&[root, etc, file]).map_err(|e| e.replace("entity not found", "No such file"));
            assert!(found.as_ref().is_err_and(|e| e.contains(why)), "{why}: {found:?}");
        }
        let open = asked(&[root, ("/etc", 0, DIR | 0o002, ""), ("/etc/resolv.conf", 0, FILE, "")]);
        assert!(open.is_err_and(|e| e.contains("/etc can be written")));
    }

    #[test]
    fn systemd_resolved_is_trusted_in_its_own_directory_only() {
        let stub = |directory: u32, of: u32, to: &'static str| {
            asked(&[
                ("/", 0, DIR, ""),
                ("/etc", 0, DIR, ""),
                ("/etc/resolv.conf", 0, 0o120777, to),
                ("/run", 0, DIR, ""),
                ("/run/systemd", 0, DIR, ""),
                ("/run/systemd/resolve", directory, DIR, ""),
                ("/run/systemd/resolve/stub-resolv.conf", of, FILE, ""),
                ("/run/user", 0, DIR, ""),
                ("/run/user/stub", 101, FILE, ""),
            ])
        };
        let to = "../run/systemd/resolve/stub-resolv.conf";
        assert_eq!(stub(101, 101, to), Ok(PathBuf::from("/run/systemd/resolve/stub-resolv.conf")));
        assert!(stub(0, 0, "/run/./systemd/../systemd/resolve/stub-resolv.conf").is_ok());
        assert!(stub(1000, 101, to).is_err_and(|e| e.contains("uid 1000")));
        assert!(stub(101, 1000, to).is_err_and(|e| e.contains("uid 1000")));
        assert!(stub(101, 101, "../run/user/stub").is_err_and(|e| e.contains("uid 101")));
    }
}
