//! What is handed out to be installed: units, options, manifests.

#[path = "support/driver.rs"]
mod driver;

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const UNITS: [&str; 2] = ["mcp-sensor.service", "mcp-sensor-collector.service"];

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn read(path: &str) -> String {
    let path = deploy(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `None`: not on this machine.
fn output(command: &mut Command, package: &str) -> Option<Output> {
    match command.output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("SKIP: {} is not installed ({package})", command.get_program().display());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says nothing of a unit that is well-formed.
fn verify(name: &str, unit: &str) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs::write(&file, unit.replace("/usr/bin/mcp-sensor", env!("CARGO_BIN_EXE_mcp-sensor"))).unwrap();
    let output = output(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file), "systemd")?;
    // Of its own surroundings it complains about on hosts that systemd does not run.
    let said = String::from_utf8_lossy(&output.stderr);
    Some(said.lines().filter(|line| line.contains(name)).collect::<Vec<_>>().join("\n"))
}

#[test]
fn units_are_well_formed() {
    for name in UNITS {
        let Some(said) = verify(name, &read(&format!("systemd/{name}"))) else { return };
        assert_eq!(said, "");
    }
}

#[test]
fn a_typo_in_a_unit_is_noticed() {
    let unit = read("systemd/mcp-sensor.service").replace("ProtectHome=", "ProtectedHome=");
    let Some(said) = verify("mcp-sensor.service", &unit) else { return };
    assert!(said.contains("ProtectedHome"), "{said}");
}

/// `systemd-analyze security`, tenths.
fn exposure_is_at_most(unit: &Path, limit: u32) -> Option<bool> {
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--no-pager", "--offline=true", &format!("--threshold={limit}")]).arg(unit);
    Some(output(&mut command, "systemd")?.status.success())
}

#[test]
fn units_are_exposed_by_at_most_3_5_of_10() {
    for name in UNITS {
        let Some(holds) = exposure_is_at_most(&deploy(&format!("systemd/{name}")), 35) else { return };
        assert!(holds, "see systemd-analyze security --offline=true deploy/systemd/{name}");
        assert_eq!(exposure_is_at_most(&deploy(&format!("systemd/{name}")), 5), Some(false), "{name}");
    }
}

/// Variables that a command takes.
fn variables(command: &str) -> BTreeSet<String> {
    let help = Command::new(env!("CARGO_BIN_EXE_mcp-sensor")).args([command, "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let names = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
    let names: BTreeSet<_> = names.map(str::to_owned).collect();
    assert!(names.contains("MCP_SENSOR_METRICS"), "{help}");
    names
}

/// Variables that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("MCP_SENSOR_")).map(str::to_owned).collect()
}

#[test]
fn every_variable_in_units_and_their_options_exists() {
    for (command, files) in [
        ("run", ["systemd/mcp-sensor.service", "systemd/sensor.conf"]),
        ("collect", ["systemd/mcp-sensor-collector.service", "systemd/collector.conf"]),
    ] {
        let known = variables(command);
        let used: BTreeSet<_> = files.iter().flat_map(|file| named(&read(file))).collect();
        assert!(!used.is_empty() && used.is_subset(&known), "{:?}", used.difference(&known));
    }
}

#[test]
fn the_first_policy_is_valid_and_denies_nothing() {
    for file in ["systemd/policy.yaml", "kubernetes/base/policy.yaml"] {
        let mut check = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"));
        assert!(check.args(["policy", "check"]).arg(deploy(file)).status().unwrap().success(), "{file}");
        let in_force = read(file).lines().filter(|line| !line.starts_with('#')).collect::<String>();
        assert!(in_force.contains("mode: audit") && !in_force.contains("enforce"), "{in_force}");
    }
}

const VERSION: &str = "1.33";

fn rendered(kustomization: &str) -> Option<String> {
    let mut kubectl = Command::new("kubectl");
    let output = output(kubectl.arg("kustomize").arg(deploy("kubernetes").join(kustomization)), "kubectl")?;
    assert!(output.status.success(), "{kustomization}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// What the manifests hold, and what is wrong with them.
fn validated(manifests: &str) -> Option<(Vec<Value>, String)> {
    let python = driver::installed("kubernetes")?.join("bin/python");
    let mut check = Command::new(python);
    let mut check = check
        .arg(driver::script("manifests.py"))
        .arg(VERSION)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(manifests.as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), said.is_empty(), "{said}");
    Some((serde_json::from_slice(&output.stdout).unwrap_or_default(), said))
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let named = |o: &&Value| o["kind"] == kind && o["metadata"]["name"] == name;
    objects.iter().find(named).unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn manifests_are_what_kubernetes_takes() {
    for kustomization in ["base", "overlays/fleet", "overlays/cert-manager", "overlays/trial"] {
        let Some(manifests) = rendered(kustomization) else { return };
        let Some((objects, wrong)) = validated(&manifests) else { return };
        assert_eq!(wrong, "", "{kustomization}");
        assert!(objects.iter().all(|o| {
            let cluster_wide = ["Namespace", "PriorityClass"].iter().any(|kind| o["kind"] == *kind);
            cluster_wide || o["metadata"]["namespace"] == "mcp-sensor"
        }));
        let sensor = &find(&objects, "DaemonSet", "mcp-sensor")["spec"]["template"]["spec"];
        let known = variables("run");
        let used: BTreeSet<_> = named(&sensor.to_string());
        assert!(used.is_subset(&known), "{kustomization}: {:?}", used.difference(&known));
        let container = &sensor["containers"][0];
        let security = &container["securityContext"];
        assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]));
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["privileged"], false);
        // What is mounted exists, and the other way round.
        let names = |list: &Value| -> BTreeSet<String> {
            list.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&container["volumeMounts"]), names(&sensor["volumes"]), "{kustomization}");
    }
}

#[test]
fn the_collector_in_a_cluster_has_no_privilege() {
    let Some(manifests) = rendered("overlays/fleet") else { return };
    let Some((objects, _)) = validated(&manifests) else { return };
    let collector = &find(&objects, "Deployment", "mcp-sensor-collector")["spec"]["template"]["spec"];
    assert_eq!(collector["securityContext"]["runAsNonRoot"], true);
    assert_eq!(collector["hostNetwork"], Value::Null);
    let container = &collector["containers"][0];
    assert_eq!(
        container["securityContext"],
        serde_json::json!({
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
        })
    );
    let (used, known) = (named(&collector.to_string()), variables("collect"));
    assert!(used.is_subset(&known), "{:?}", used.difference(&known));
}

#[test]
fn a_typo_in_a_manifest_is_noticed() {
    let Some(manifests) = rendered("base") else { return };
    let wrong = manifests.replace("readOnlyRootFilesystem", "readonlyRootFilesystem");
    let Some((_, said)) = validated(&wrong) else { return };
    assert!(said.contains("readonlyRootFilesystem"), "{said}");
}

/// What a program under a service manager says to it, until it says `until`.
fn told(socket: &UnixDatagram, until: &str) -> Vec<String> {
    let mut told = Vec::new();
    loop {
        let mut datagram = [0; 4096];
        let length = socket.recv(&mut datagram).unwrap_or_else(|error| panic!("{error}; so far {told:?}"));
        told.extend(String::from_utf8_lossy(&datagram[..length]).lines().map(str::to_owned));
        if told.iter().any(|line| line == until) {
            return told;
        }
    }
}

#[test]
fn the_service_manager_hears_that_a_collector_is_ready_alive_and_ending() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let listen = format!("unix:{}", dir.path().join("c.sock").display());
    let mut collector = Command::new(env!("CARGO_BIN_EXE_mcp-sensor"))
        .args(["collect", "--quiet", "--listen", &listen, "--dir"])
        .arg(dir.path().join("events"))
        .env("NOTIFY_SOCKET", &path)
        .spawn()
        .unwrap();
    assert_eq!(told(&socket, &format!("STATUS=listening on {listen}"))[0], "READY=1");
    told(&socket, "WATCHDOG=1");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(collector.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    told(&socket, "STOPPING=1");
    assert!(collector.wait().unwrap().success());
}
