use super::*;
use sensor_common::policy::Reason;
use sensor_common::{TCP, UDP};

const EXAMPLE: &str = r#"
version: 1
profiles:
  db:
    egress:
      - to: [10.0.0.0/8]
        ports: [443]
      - to: [10.20.0.0/16, "2001:db8::/32"]
        ports: [5432, 6000-6010]
      - to: [10.20.0.53]
        ports: [53]
        protocol: [tcp, udp]
      - to: [self]
    inbound: [{from: [127.0.0.1/32, "::1/128"], ports: [3901]}]
  empty: {}
servers:
  - {name: db, profile: db, mode: enforce, match: [{package: "@modelcontextprotocol/server-db"}]}
"#;

#[test]
fn a_cidr_carries_what_the_cidrs_around_it_allow() {
    let c = compiled(EXAMPLE);
    let rule = |d: Decision| c.rule(d.rule).map(|r| (d.reason, r.path.clone(), r.line));
    let path = |n: u32, line: u32| Some((Reason::Rule, format!("profiles.db.egress[{n}]"), line));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 443, TCP)), path(0, 6));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 6005, TCP)), path(1, 8));
    assert_eq!(rule(egress(&c, "db", "10.20.0.53", 53, UDP)), path(2, 10));
    assert_eq!(rule(egress(&c, "db", "2001:db8::9", 5432, TCP)), path(1, 8));
    assert_eq!(egress(&c, "db", "10.20.0.54", 53, UDP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "db", "10.21.0.1", 5432, TCP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "db", "10.21.0.1", 443, UDP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "empty", "10.20.0.53", 53, UDP).reason, Reason::NoRule);
    assert_eq!(egress(&c, "none", "127.0.0.1", 80, TCP).reason, Reason::ProfileNone);
    assert_eq!(egress(&c, "unrestricted", "1.1.1.1", 80, TCP).reason, Reason::Unrestricted);
    assert_eq!(inbound(&c, "db", "127.0.0.1", 3901, TCP).reason, Reason::Rule);
    assert_eq!(inbound(&c, "db", "127.0.0.2", 3901, TCP).reason, Reason::NoInboundRule);
}
