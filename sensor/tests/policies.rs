//! Policies on their way from a collector's directory to sensors, and what
//! these say of them.

mod support;

use mcp_sensor::event::{Bus, Identity, Limits, pb};
use mcp_sensor::feed::{self, Collectors, PolicyLink, SpoolSettings, Target};
use mcp_sensor::policy::bundle::{Bundle, Draft, SigningKey};
use pb::events_client::EventsClient;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;
use support::DEADLINE;
use support::collector::{channel, collect};
use tokio::sync::watch;
use tokio::time::timeout;

fn bundle(version: u64, group: &str) -> Bundle {
    let files = vec![("policy.yaml".to_owned(), b"version: 1\n".to_vec())];
    let draft = Draft { version, group: group.to_owned(), files, ..Draft::default() };
    draft.sign(&SigningKey::generate().unwrap()).unwrap()
}

fn put(dir: &Path, name: &str, bytes: &[u8]) {
    let new = dir.join(format!("{name}.new"));
    std::fs::write(&new, bytes).unwrap();
    std::fs::rename(new, dir.join(name)).unwrap();
}

/// A sensor's feed, with a test in the agent's place.
struct Sensor {
    bus: Arc<Bus>,
    offers: watch::Receiver<Vec<u8>>,
    state: watch::Sender<pb::BundleState>,
    task: tokio::task::JoinHandle<()>,
}

impl Sensor {
    fn start(name: &str, group: &str, address: &str, dir: &Path) -> Sensor {
        let bus = Bus::new(Identity { sensor: name.to_owned(), boot: "b".to_owned() }, Limits::default());
        let (offers, offered) = watch::channel(Vec::new());
        let state = watch::Sender::new(pb::BundleState { group: group.to_owned(), ..Default::default() });
        let policy = Some(PolicyLink { offers, state: state.subscribe() });
        let targets = vec![Target::new(address, None, false).unwrap()];
        let spool = SpoolSettings { dir: dir.join(name), limits: feed::spool::Limits { bytes: 1 << 20 } };
        let backoff = (Duration::from_millis(10), Duration::from_millis(50));
        let settings = feed::Settings { backoff, ..feed::Settings::default() };
        let subscriber = bus.subscribe("collector", feed::BACKLOG).unwrap();
        let collectors = Collectors { targets, policy };
        let (_, task) = feed::spawn(bus.clone(), subscriber, collectors, &spool, settings, None).unwrap();
        Sensor { bus, offers: offered, state, task }
    }

    async fn offered(&mut self) -> Bundle {
        timeout(DEADLINE, self.offers.changed()).await.expect("a policy").unwrap();
        Bundle::parse(&self.offers.borrow_and_update()).unwrap()
    }

    async fn end(self) {
        self.bus.close();
        timeout(DEADLINE, self.task).await.unwrap().unwrap();
    }
}

async fn fleet(address: &str, shows: impl Fn(&pb::FleetResponse) -> bool) -> pb::FleetResponse {
    let mut client = EventsClient::new(channel(address).await);
    let asking = async {
        loop {
            let fleet = client.fleet(pb::FleetRequest::default()).await.unwrap().into_inner();
            if shows(&fleet) {
                return fleet;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, asking).await.expect("the fleet shows it")
}

#[tokio::test]
async fn each_sensor_gets_the_newest_policy_of_its_group_and_says_what_became_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let policies = dir.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    put(&policies, "all", &bundle(1, "").signed);
    put(&policies, "web", &bundle(2, "web").signed);
    let listen = format!("unix:{}/c.sock", dir.path().display());
    let arguments = ["--policies", policies.to_str().unwrap()];
    let _collector = collect(&dir.path().join("events"), &listen, &arguments).await;
    let mut web = Sensor::start("w", "web", &listen, dir.path());
    let mut other = Sensor::start("o", "", &listen, dir.path());
    assert_eq!((web.offered().await.version, other.offered().await.version), (2, 1));

    // Taken up without a restart; what is no bundle changes nothing.
    put(&policies, "web", b"no bundle");
    let third = bundle(3, "");
    put(&policies, "all", &third.signed);
    assert_eq!((web.offered().await, other.offered().await), (third.clone(), third.clone()));

    web.state.send_modify(|s| (s.version, s.hash) = (3, third.hash.clone()));
    other.state.send_modify(|s| (s.kind, s.error) = ("policy_bundle_signature".into(), "no".into()));
    let said = |fleet: &pb::FleetResponse, name: &str| {
        fleet.sensors.iter().find(|s| s.sensor == name).and_then(|s| s.bundle.clone()).unwrap_or_default()
    };
    let shown = fleet(&listen, |f| {
        said(f, "w").version == 3 && !said(f, "o").kind.is_empty() && f.policies.len() == 2
    })
    .await;
    assert_eq!((said(&shown, "w").hash, said(&shown, "w").group), (third.hash, "web".to_owned()));
    assert_eq!(said(&shown, "o").error, "no");
    let refused = shown.policies.iter().find(|p| p.file == "web").unwrap();
    assert!(refused.error.contains("not a policy bundle") && refused.version == 2, "{refused:?}");
    web.end().await;
    other.end().await;
}

#[tokio::test]
async fn a_sensor_that_has_it_already_is_not_given_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let policies = dir.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    let (first, second) = (bundle(1, ""), bundle(2, ""));
    put(&policies, "all", &first.signed);
    let listen = format!("unix:{}/c.sock", dir.path().display());
    let arguments = ["--policies", policies.to_str().unwrap()];
    let _collector = collect(&dir.path().join("events"), &listen, &arguments).await;
    let mut sensor = Sensor::start("s", "", &listen, dir.path());
    sensor.offered().await;
    sensor.state.send_modify(|s| (s.version, s.hash) = (1, first.hash.clone()));
    fleet(&listen, |f| f.sensors.iter().any(|s| s.bundle.as_ref().is_some_and(|b| b.version == 1))).await;
    sensor.end().await;
    let mut again = Sensor::start("s", "", &listen, dir.path());
    again.state.send_modify(|s| (s.version, s.hash) = (1, first.hash.clone()));
    put(&policies, "all", &second.signed);
    let mut offers = vec![again.offered().await.version];
    while offers.last() != Some(&2) {
        offers.push(again.offered().await.version);
    }
    // The state may have come after the first Hello; never twice the same.
    assert!(offers == [2] || offers == [1, 2], "{offers:?}");
    again.end().await;
}

/// Answer of an HTTP server to one GET.
async fn get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

#[tokio::test]
async fn a_bad_file_is_counted_beside_the_collectors_health() {
    use mcp_sensor::collect::{Archive, Collector};
    use mcp_sensor::metrics::Server;
    let dir = tempfile::tempdir().unwrap();
    let policies = dir.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    put(&policies, "good", &bundle(1, "").signed);
    let archive = Archive::open(&dir.path().join("events"), support::collector::LARGE, None).unwrap();
    let listen = format!("unix:{}/c.sock", dir.path().display()).parse().unwrap();
    let collector = Collector::bind(&listen, archive, None).await.unwrap().with_policies(&policies).unwrap();
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), collector.page()).unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve());
    let metrics = get(address, "/metrics").await;
    for line in ["mcp_sensor_collector_ready 1\n", "mcp_sensor_collector_policies_refused 0\n"] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    put(&policies, "bad", b"no bundle");
    let counted = async {
        while !get(address, "/metrics").await.contains("mcp_sensor_collector_policies_refused 1\n") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, counted).await.expect("it is counted");
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    serving.abort();
}

fn cli(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcp-sensor"))
        .args(["policy"])
        .args(arguments)
        .current_dir(dir)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_policy_is_signed_and_verified_on_the_command_line() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| cli(dir.path(), arguments);
    let made = run(&["keygen", "-o", "key.pem"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let mode = std::fs::metadata(dir.path().join("key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(run(&["keygen", "-o", "key.pem"]).status.code(), Some(1), "never overwritten");

    let policy = "version: 1\nservers: [{name: a, profile: ./a.json, mode: enforce}]\n";
    std::fs::write(dir.path().join("policy.yaml"), policy).unwrap();
    std::fs::write(
        dir.path().join("a.json"),
        r#"{"network": {"outbound": {"allow_host": ["api.example.com"], "allow_port": [443]}}}"#,
    )
    .unwrap();
    let sign =
        ["sign", "--key", "key.pem", "--version", "4", "--group", "web", "-o", "b.bundle", "policy.yaml"];
    let alone = run(&sign);
    assert_eq!(alone.status.code(), Some(3), "{}", text(&alone.stderr));
    assert!(text(&alone.stderr).contains("not in the bundle") && !dir.path().join("b.bundle").exists());
    let signed = run(&[&sign[..], &["a.json"]].concat());
    assert!(signed.status.success(), "{}", text(&signed.stderr));
    let verified = run(&["verify", "--key", "key.pem.pub", "b.bundle", "-o", "json"]);
    assert!(verified.status.success(), "{}", text(&verified.stderr));
    let said: serde_json::Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!((&said["version"], &said["group"]), (&4.into(), &"web".into()));
    assert_eq!(said["files"].as_array().unwrap().len(), 2);

    run(&["keygen", "-o", "other.pem"]);
    let other = run(&["verify", "--key", "other.pem.pub", "b.bundle"]);
    assert!(
        other.status.code() == Some(1) && text(&other.stderr).contains("not pinned"),
        "{}",
        text(&other.stderr)
    );
    let mut bytes = std::fs::read(dir.path().join("b.bundle")).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(dir.path().join("b.bundle"), bytes).unwrap();
    assert_eq!(run(&["verify", "--key", "key.pem.pub", "b.bundle"]).status.code(), Some(1));
    std::fs::write(dir.path().join("policy.yaml"), "version: 1\nservers: {\n").unwrap();
    let invalid = run(&[&sign[..], &["a.json"]].concat());
    assert!(invalid.status.code() == Some(3) && text(&invalid.stderr).contains("nothing was signed"));
}
