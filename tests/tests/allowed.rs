//! What must not be denied: programs that do more than they need to reach an
//! allowed destination, and services behind a translated address.

use anyhow::{Context, Result, bail, ensure};
use mcp_sensor_tests::bed::{Bed, LIMIT};
use mcp_sensor_tests::drivers::{found, installed, with_resolver};
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::network::{ALLOWED_V4, ALLOWED_V6, DENIED_V4, DENIED_V6, Family};
use mcp_sensor_tests::peer::{Client, PORT};
use mcp_sensor_tests::policy::{Policy, allowed_cidr};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::service::{NAME, Service};
use mcp_sensor_tests::spec::{Claim, must, run};
use std::path::PathBuf;

/// The service, and names from the peer.
const USER: &str = "user";

fn policy() -> Policy {
    let (v4, v6) = (allowed_cidr(Family::V4), allowed_cidr(Family::V6));
    let body = format!(
        "egress:\n\
         \x20 - {{to: [{v4}, \"{v6}\"], ports: [{PORT}], protocol: tcp}}\n\
         \x20 - {{to: [{v4}, \"{v6}\"], ports: [53], protocol: udp}}\n"
    );
    Policy::standard().profile("user", &body).server(USER, "user", "enforce", "")
}

/// The program looks up [`NAME`], connects and prints `says`; not one denial.
fn is_not_denied(program: PathBuf, arguments: &[&str], says: &str) -> Result<Claim> {
    let bed = Bed::new()?;
    let _names = Service::names(&bed.network)?;
    let sensor = Sensor::start(&bed, &policy())?;
    let mut command = bed.labelled(&sensor, USER, program)?;
    command.args(arguments);
    with_resolver(&mut command, bed.folder.path(), ALLOWED_V4.into())?;
    let done = Running::start(command)?.finish(LIMIT)?;
    ensure!(
        done.lines.iter().any(|l| l.contains(says)),
        "it says {:?}, not \"{says}\": {}",
        done.lines,
        done.stderr
    );
    // A denial of somebody else afterwards proves that none of its own is on the way.
    let to = DENIED_V4.to_string();
    let marker = ["tcp-connect", "--to", &to, "--port", "9"].map(String::from);
    bed.try_out(bed.labelled_attempt(&sensor, mcp_sensor_tests::policy::NONE, &marker)?)?;
    sensor.events().wait_for("the marker", SOON, |e| e.is_denial_of(mcp_sensor_tests::policy::NONE))?;
    let denials = sensor.events().denials_of(USER)?;
    ensure!(denials.is_empty(), "{denials:?}");
    Ok(Claim::Holds)
}

fn with(program: &str, arguments: &[&str], says: &str) -> Result<Claim> {
    match found(program) {
        Some(path) => is_not_denied(path, arguments, says),
        None => Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)"))),
    }
}

fn python(code: &str, says: &str) -> Result<Claim> {
    with("python3", &["-c", &code.replace("NAME", NAME).replace("PORT", &PORT.to_string())], says)
}

fn node(code: &str, says: &str) -> Result<Claim> {
    with("node", &["-e", &code.replace("NAME", NAME).replace("PORT", &PORT.to_string())], says)
}

#[test]
fn python_getaddrinfo_and_its_address_sort_are_not_denied() {
    run(|| {
        python(
            "import socket; print(sorted(a[4][0] for a in socket.getaddrinfo('NAME', PORT, type=socket.SOCK_STREAM)))",
            &format!("['{ALLOWED_V4}', '{ALLOWED_V6}']"),
        )
    });
}

#[test]
fn python_create_connection_is_not_denied() {
    run(|| {
        python(
            "import socket; s = socket.create_connection(('NAME', PORT), 3); s.sendall(b'hello'); print(s.recv(9))",
            "b'hello'",
        )
    });
}

#[test]
fn asyncio_with_happy_eyeballs_is_not_denied() {
    run(|| {
        python(
            "import asyncio\n\
             async def main():\n\
             \x20   r, w = await asyncio.open_connection('NAME', PORT, happy_eyeballs_delay=0.05)\n\
             \x20   w.write(b'hello')\n\
             \x20   print(await r.read(9))\n\
             asyncio.run(main())",
            "b'hello'",
        )
    });
}

#[test]
fn node_lookup_is_not_denied() {
    run(|| {
        node(
            "require('dns').lookup('NAME', {all: true}, (e, a) => console.log(e || a.map(x => x.address).sort().join()))",
            &format!("{ALLOWED_V4},{ALLOWED_V6}"),
        )
    });
}

#[test]
fn node_connect_with_happy_eyeballs_is_not_denied() {
    run(|| {
        node(
            "const s = require('net').connect({port: PORT, host: 'NAME', autoSelectFamily: true}, () => s.write('hello'));\
             s.on('data', d => { console.log('' + d); s.end() }); s.on('error', e => console.log(e))",
            "hello",
        )
    });
}

#[test]
fn node_fetch_is_not_denied() {
    run(|| {
        node(
            "fetch('http://NAME:PORT/').catch(e => console.log(e.cause && e.cause.code))",
            // The peer echoes the request: no HTTP, but there and back.
            "HPE_",
        )
    });
}

#[test]
fn gos_resolver_and_dialler_are_not_denied() {
    run(|| {
        if found("go").is_none() {
            return Ok(Claim::Skipped("go is not installed (ENOENT): apt-get install golang-go".into()));
        }
        let dial = installed("go")?.join("dial");
        is_not_denied(dial, &[&format!("{NAME}:{PORT}")], "answered")
    });
}

/// Rewrites a service address to the peer's address that no rule allows, as
/// kube-proxy and Docker do.
struct Translation {
    family: Family,
    bed: Bed,
    sensor: Sensor,
    program: PathBuf,
}

const SERVICE_PORT: u16 = 80;

impl Translation {
    fn service(family: Family) -> &'static str {
        match family {
            Family::V4 => "10.96.0.10",
            Family::V6 => "fd96::10",
        }
    }

    fn new(family: Family) -> Result<Translation> {
        let bed = Bed::new()?;
        let service = Translation::service(family);
        let (ip, backend) = match family {
            Family::V4 => ("ip", DENIED_V4.to_string()),
            Family::V6 => ("ip6", format!("[{DENIED_V6}]")),
        };
        let rules = format!(
            "table {ip} service {{\n chain output {{\n  type nat hook output priority -100;\n  \
             {ip} daddr {service} tcp dport {SERVICE_PORT} dnat to {backend}:{PORT}\n  \
             {ip} daddr {service} udp dport {SERVICE_PORT} dnat to {backend}:{PORT}\n }}\n}}\n"
        );
        bed.network.server.tool("nft", &["-f", "-"], &rules)?;
        let program = bed.copy_of_attempt("server")?;
        let mask = if family == Family::V4 { 32 } else { 128 };
        let rule = |protocol: &str| {
            format!("  - {{to: [\"{service}/{mask}\"], ports: [{SERVICE_PORT}], protocol: {protocol}}}\n")
        };
        let policy = Policy::standard()
            .profile("service", &format!("egress:\n{}{}", rule("tcp"), rule("udp")))
            .server(USER, "service", "enforce", &format!("match: [{{exe: \"{}\"}}]", program.display()));
        let sensor = Sensor::start(&bed, &policy)?;
        Ok(Translation { family, bed, sensor, program })
    }

    fn run(&self, name: &str, to: &str, port: u16, uid: u32) -> Result<mcp_sensor_tests::bed::Tried> {
        use std::os::unix::process::CommandExt;
        // Changed before the exec that gives the label: the server never has CAP_NET_ADMIN.
        let mut command = self.bed.command(&self.program)?;
        command.args([name, "--to", to, "--port", &port.to_string()]);
        enter_as(&mut command, uid);
        let _ = command.arg0("server");
        self.bed.try_out(command)
    }

    fn passes_for_a_plain_user(&self, name: &str) -> Result<()> {
        let service = Translation::service(self.family);
        let tried = self.run(name, service, SERVICE_PORT, 65534)?;
        ensure!(tried.report.answered(), "{name}: {} {:?}", tried.report, tried.frames);
        let denied: Vec<_> = self.sensor.events().denials_of(USER)?;
        ensure!(denied.is_empty(), "{denied:?}");
        let there = |f: &Frame| f.destination() == Some(self.family.denied());
        ensure!(tried.frames.iter().any(there), "not translated: {:?}", tried.frames);
        // The address behind it is not opened by that.
        let tried = self.run(name, &self.family.denied().to_string(), PORT, 65534)?;
        ensure!(tried.frames.is_empty(), "the backend itself: {:?}", tried.frames);
        Ok(())
    }

    fn is_denied_with_net_admin(&self, name: &str) -> Result<()> {
        let service = Translation::service(self.family);
        let tried = self.run(name, service, SERVICE_PORT, 0)?;
        ensure!(tried.frames.is_empty(), "{name}: {} {:?}", tried.report, tried.frames);
        self.sensor.events().wait_for("a denial", SOON, |e| e.is_denial_of(USER))?;
        Ok(())
    }
}

/// After the cgroup and the namespace, which need root.
fn enter_as(command: &mut std::process::Command, uid: u32) {
    use std::os::unix::process::CommandExt;
    let hook = move || {
        if uid != 0 {
            let (user, group) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(uid));
            nix::unistd::setgroups(&[])?;
            nix::unistd::setresgid(group, group, group)?;
            nix::unistd::setresuid(user, user, user)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only three system calls without memory.
    unsafe { command.pre_exec(hook) };
}

fn translation(family: Family, test: impl FnOnce(&Translation) -> Result<()>) -> Result<Claim> {
    if found("nft").is_none() {
        return Ok(Claim::Skipped("nft is not installed (ENOENT): apt-get install nftables".into()));
    }
    test(&Translation::new(family)?).map(|()| Claim::Holds)
}

#[test]
fn tcp_v4_to_a_translated_service_passes() {
    run(|| translation(Family::V4, |t| t.passes_for_a_plain_user("tcp-connect")));
}

#[test]
fn tcp_v6_to_a_translated_service_passes() {
    run(|| translation(Family::V6, |t| t.passes_for_a_plain_user("tcp-connect")));
}

#[test]
fn connected_udp_v4_to_a_translated_service_passes() {
    run(|| translation(Family::V4, |t| t.passes_for_a_plain_user("udp-connect-send")));
}

#[test]
fn unconnected_udp_v4_to_a_translated_service_passes() {
    run(|| translation(Family::V4, |t| t.passes_for_a_plain_user("udp-sendto")));
}

#[test]
fn unconnected_udp_v6_to_a_translated_service_passes() {
    run(|| translation(Family::V6, |t| t.passes_for_a_plain_user("udp-sendto")));
}

#[test]
fn translation_is_not_trusted_where_the_server_could_have_made_it() {
    run(|| translation(Family::V4, |t| t.is_denied_with_net_admin("udp-sendto")));
}

#[test]
fn tcp_translation_is_not_trusted_where_the_server_could_have_made_it() {
    run(|| translation(Family::V6, |t| t.is_denied_with_net_admin("tcp-connect")));
}

/// A server of the HTTP kind, called by others under its inbound rule.
fn answers_its_clients(program: &str, arguments: &[&str]) -> Result<Claim> {
    const HTTP: u16 = 3901;
    let Some(program) = found(program) else {
        return Ok(Claim::Skipped(format!("{program} is not installed (ENOENT)")));
    };
    let bed = Bed::new()?;
    let (v4, v6) = (allowed_cidr(Family::V4), allowed_cidr(Family::V6));
    let policy = Policy::standard()
        .profile("http", &format!("inbound: [{{from: [{v4}, \"{v6}\"], ports: [{HTTP}]}}]"))
        .server("http", "http", "enforce", "");
    let sensor = Sensor::start(&bed, &policy)?;
    let mut command = bed.labelled(&sensor, "http", program)?;
    command.args(arguments);
    let mut server = Running::start(command)?;
    server.wait_for_line("listening", LIMIT)?;
    for family in [Family::V4, Family::V6] {
        for _ in 0..3 {
            let address = (family.server(), HTTP).into();
            let client =
                Client::tcp(&bed.network, family.allowed(), address).context("a client it may have")?;
            let answer = client.ask(b"GET / HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n", SOON)?;
            let answer = String::from_utf8_lossy(&answer.unwrap_or_default()).into_owned();
            ensure!(answer.starts_with("HTTP/1.1 200"), "{family:?}: {answer:?}");
        }
    }
    let denials = sensor.events().denials_of("http")?;
    ensure!(denials.is_empty(), "{denials:?}");
    let stranger = Client::tcp(&bed.network, Family::V4.denied(), (Family::V4.server(), HTTP).into());
    if stranger.is_ok() {
        bail!("a client that no rule names got through");
    }
    Ok(Claim::Holds)
}

#[test]
fn a_node_http_server_answers_its_clients() {
    run(|| {
        let code = "require('http').createServer((q, s) => s.end('hi')).listen(3901, () => console.log('listening'))";
        answers_its_clients("node", &["-e", code])
    });
}

#[test]
fn a_python_http_server_answers_its_clients() {
    run(|| {
        let code = "import asyncio\n\
            async def serve(r, w):\n\
            \x20   await r.readuntil(b'\\r\\n\\r\\n')\n\
            \x20   w.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nhi')\n\
            \x20   await w.drain()\n\
            \x20   w.close()\n\
            async def main():\n\
            \x20   s = await asyncio.start_server(serve, ['0.0.0.0', '::'], 3901)\n\
            \x20   print('listening', flush=True)\n\
            \x20   await s.serve_forever()\n\
            asyncio.run(main())";
        answers_its_clients("python3", &["-c", code])
    });
}

#[test]
fn an_allowed_answer_is_recorded_as_allowed() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &policy())?;
        let to = ALLOWED_V4.to_string();
        let connect = ["tcp-connect", "--to", &to, "--port", &PORT.to_string()].map(String::from);
        let tried = bed.try_out(bed.labelled_attempt(&sensor, USER, &connect)?)?;
        ensure!(tried.report.answered(), "{}", tried.report);
        let event = sensor.events().wait_for("an allow", SOON, |e| {
            e.text("verdict") == "allow"
                && e.text("server") == USER
                && e.number("dst.port") == Some(PORT.into())
        })?;
        ensure!(event.text("dst.ip") == to && event.text("protocol") == "tcp", "{}", event.0);
        ensure!(!event.text("rule").is_empty(), "no rule is named: {}", event.0);
        Ok(())
    });
}
