//! Names as real programs look them up and use them: C libraries, language
//! runtimes, resolvers from the distribution, and an MCP server.

use anyhow::{Result, bail, ensure};
use mcp_sensor_tests::bed::LIMIT;
use mcp_sensor_tests::dns::zone::{Zone, addresses_of};
use mcp_sensor_tests::drivers::{found, installed, script, with_resolver};
use mcp_sensor_tests::events::Event;
use mcp_sensor_tests::names::{
    API, CDN, FOREIGN, NAMED, OTHER, PLAIN, RESOLVER, Ran, World, ask, ask_tcp, connect, ip, policy,
};
use mcp_sensor_tests::network::enter;
use mcp_sensor_tests::run::{Finished, Running};
use mcp_sensor_tests::service::PAGE;
use mcp_sensor_tests::spec::{Claim, run};
use mcp_sensor_tests::step::Step;
use mcp_sensor_tests::tls::{Groups, PORT, TlsServer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const ONE: &str = "198.51.100.7";
const SIX: &str = "2001:db8::7";
const BELOW: &str = "www.cdn.example.test";
/// Interpreters start several times.
const SESSION: Duration = Duration::from_secs(60);

fn zone() -> Zone {
    let both = [ip(ONE), ip(SIX)];
    Zone::new()
        .host(API, &both)
        .host(OTHER, &both)
        .below(CDN, move |q, _| vec![addresses_of(q, &both).into()])
}

/// [`World`] with a web server on port 443.
struct Web {
    world: World,
    server: TlsServer,
}

impl Web {
    fn new(labelled: bool) -> Result<Web> {
        let policy = policy().server("fetch", NAMED, "enforce", "match: [{script: mcp-server-fetch}]");
        let world = World::with_policy(labelled, zone, &policy)?;
        let names = [API, OTHER, ONE, "*.cdn.example.test"];
        let folder = world.bed.folder.path();
        let server = TlsServer::start(&world.bed.network, folder, &names, PORT, Groups::Usual)?;
        Ok(Web { world, server })
    }

    fn run(&self, program: &Path, arguments: &[String], resolver: IpAddr) -> Result<Finished> {
        let mut command = self.world.command(NAMED, program)?;
        command.args(arguments);
        for key in ["NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"] {
            command.env(key, &self.server.ca);
        }
        with_resolver(&mut command, self.world.bed.folder.path(), resolver)?;
        Running::start(command)?.finish(LIMIT)
    }
}

/// The program says `says` for an allowed name, and, labelled, does not for
/// another; the other name's query never arrives.
fn finds_its_names(
    labelled: bool,
    program: &Path,
    arguments: impl Fn(&str) -> Vec<String>,
    says: &str,
) -> Result<Claim> {
    let web = Web::new(labelled)?;
    for name in [API, BELOW] {
        let done = web.run(program, &arguments(name), RESOLVER.ip())?;
        let said = done.lines.iter().any(|l| l.contains(says));
        ensure!(said, "{name}: it says {:?}, not \"{says}\": {}", done.lines, done.stderr);
    }
    if let Some(sensor) = &web.world.sensor {
        // Type 65 is asked by some before they connect, and denied.
        let is_other = |e: &&Event| {
            e.is_denial_of(NAMED)
                || e.text("type") == "dns" && e.text("verdict") == "deny" && e.text("reason") != "query_type"
        };
        let others: Vec<_> = sensor.events().all()?.iter().filter(is_other).cloned().collect();
        ensure!(others.is_empty(), "{others:?}");
    }
    let done = web.run(program, &arguments(OTHER), RESOLVER.ip())?;
    let said = done.lines.iter().any(|l| l.contains(says));
    let asked = web.world.resolver.asked().iter().any(|q| q.is_for(OTHER));
    ensure!(said != labelled && asked != labelled, "{OTHER}: {:?} {}", done.lines, done.stderr);
    if labelled {
        web.world.expect_name_event("name_no_rule", OTHER)?;
    }
    Ok(Claim::Holds)
}

fn missing(program: &str, package: &str) -> Claim {
    Claim::Skipped(format!("{program} is not installed (ENOENT): apt-get install {package}"))
}

fn python(labelled: bool, code: &str, says: &str) -> Result<Claim> {
    let Some(python) = found("python3") else { return Ok(missing("python3", "python3")) };
    finds_its_names(labelled, &python, |name| vec!["-c".into(), filled(code, name)], says)
}

/// With `requests` and `httpx`, which an MCP server brings along.
fn python_with_packages(labelled: bool, code: &str, says: &str) -> Result<Claim> {
    if found("python3").is_none() {
        return Ok(missing("python3", "python3 python3-venv"));
    }
    let python = installed("venv")?.join("bin/python");
    finds_its_names(labelled, &python, |name| vec!["-c".into(), filled(code, name)], says)
}

fn node(labelled: bool, code: &str, says: &str) -> Result<Claim> {
    let Some(node) = found("node") else { return Ok(missing("node", "nodejs")) };
    finds_its_names(labelled, &node, |name| vec!["-e".into(), filled(code, name)], says)
}

fn filled(code: &str, name: &str) -> String {
    code.replace("NAME", name).replace("PORT", &PLAIN.to_string())
}

fn compiled(labelled: bool, what: &str, arguments: fn(&str) -> Vec<String>, says: &str) -> Result<Claim> {
    let (compiler, package, program) =
        if what == "go" { ("go", "golang-go", "dial") } else { ("musl-gcc", "musl-tools", "resolve") };
    if found(compiler).is_none() {
        return Ok(missing(compiler, package));
    }
    finds_its_names(labelled, &installed(what)?.join(program), arguments, says)
}

/// One test with a label and one without.
macro_rules! clients {
    ($($name:ident: $test:expr;)+) => {
        $(mod $name {
            use super::*;

            #[test]
            fn unlabelled_gets_through() { run(|| $test(false)); }

            #[test]
            fn labelled_is_held_to_its_names() { run(|| $test(true)); }
        })+
    };
}

clients! {
    glibc_getaddrinfo_and_every_address: |l| python(
        l,
        "import socket\n\
         found = socket.getaddrinfo('NAME', PORT, type=socket.SOCK_STREAM)\n\
         for family, kind, protocol, _, to in found:\n\
         \x20   s = socket.socket(family, kind, protocol)\n\
         \x20   s.settimeout(2)\n\
         \x20   s.connect(to)\n\
         \x20   s.sendall(b'hello')\n\
         \x20   assert s.recv(9) == b'hello'\n\
         print(sorted(a[4][0] for a in found))",
        &format!("['{ONE}', '{SIX}']"),
    );
    glibc_gethostbyname: |l| python(l, "import socket; print(socket.gethostbyname('NAME'))", ONE);
    asyncio_with_happy_eyeballs: |l| python(
        l,
        "import asyncio\n\
         async def main():\n\
         \x20   r, w = await asyncio.open_connection('NAME', PORT, happy_eyeballs_delay=0.05)\n\
         \x20   w.write(b'hello')\n\
         \x20   print(await r.read(9))\n\
         asyncio.run(main())",
        "b'hello'",
    );
    python_requests: |l| python_with_packages(
        l, "import requests; print(requests.get('https://NAME/', timeout=5).text)", PAGE,
    );
    python_httpx: |l| python_with_packages(
        l,
        "import httpx, os, ssl\n\
         ca = ssl.create_default_context(cafile=os.environ['SSL_CERT_FILE'])\n\
         print(httpx.get('https://NAME/', verify=ca, timeout=5).text)",
        PAGE,
    );
    musl_getaddrinfo_and_every_address: |l| compiled(
        l, "musl", |name| vec![name.into(), PLAIN.to_string()], "answered by 2 addresses",
    );
    gos_resolver_and_dialler: |l| compiled(l, "go", |name| vec![format!("{name}:{PLAIN}")], "answered");
    node_lookup: |l| node(
        l,
        "const net = require('net');\
         require('dns').lookup('NAME', {all: true}, (e, all) => {\
           if (e) return console.log(e.code);\
           let left = all.length;\
           for (const a of all) {\
             const s = net.connect(PORT, a.address, () => s.write('hello'));\
             s.on('error', e => console.log(e.code));\
             s.on('data', () => { s.end(); if (--left == 0) console.log('all answered') });\
           }\
         })",
        "all answered",
    );
    node_resolve4_and_resolve6: |l| node(
        l,
        "const dns = require('dns').promises, net = require('net');\
         (async () => {\
           const all = [...await dns.resolve4('NAME'), ...await dns.resolve6('NAME')];\
           for (const a of all) await new Promise((yes, no) => {\
             const s = net.connect(PORT, a, () => s.write('hello'));\
             s.on('error', no); s.on('data', () => { s.end(); yes() });\
           });\
           console.log('answered', all.length);\
         })().catch(e => console.log(e.code))",
        "answered 2",
    );
    node_fetch_over_https: |l| node(
        l,
        "fetch('https://NAME/').then(r => r.text()).then(t => console.log(t), e => console.log(e.cause && e.cause.code))",
        PAGE,
    );
    rusts_standard_library: |l| {
        let steps = |name: &str| {
            let steps = [Step::System { name: name.into(), port: PLAIN }];
            vec!["steps".into(), "--".into(), serde_json::to_string(&steps).expect("plain data")]
        };
        finds_its_names(l, &mcp_sensor_tests::run::built("attempt")?, steps, r#""answered":true},"addresses""#)
    };
    dnsmasq: |l| real_resolver(l, "dnsmasq", "dnsmasq-base", start_dnsmasq);
    unbound: |l| real_resolver(l, "unbound", "unbound", start_unbound);
    mcp_server_fetch: fetch;
}

/// One name with a hundred addresses, which needs TCP, and one behind a CNAME.
const MANY: &str = "many.cdn.example.test";
const ADDRESSES: u32 = 100;

fn start_dnsmasq(web: &Web, _: &Path) -> Result<Running> {
    let mut command = Command::new("dnsmasq");
    command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]);
    command.args(["--bind-interfaces", "--user=root", "--pid-file=", "--local=/test/", "--log-facility=-"]);
    command.arg(format!("--listen-address={}", RESOLVER.ip()));
    command.arg(format!("--host-record={API},target.elsewhere.test,{ONE},{SIX}"));
    command.arg(format!("--host-record={OTHER},{ONE}"));
    command.arg(format!("--cname={BELOW},target.elsewhere.test"));
    for n in 1..=ADDRESSES {
        command.arg(format!("--host-record={MANY},198.51.100.{n}"));
    }
    enter(&mut command, web.world.bed.network.peer.try_clone()?, None);
    Running::start(command)
}

fn start_unbound(web: &Web, folder: &Path) -> Result<Running> {
    let mut zone = format!(
        "$ORIGIN test.\n@ 60 IN SOA ns.test. root.test. 1 60 60 60 60\n@ 60 IN NS ns.test.\nns 60 IN A {}\n\
         api.example 60 IN A {ONE}\napi.example 60 IN AAAA {SIX}\nother.example 60 IN A {ONE}\n\
         www.cdn.example 60 IN CNAME target.elsewhere\ntarget.elsewhere 60 IN A {ONE}\n\
         target.elsewhere 60 IN AAAA {SIX}\n",
        RESOLVER.ip()
    );
    for n in 1..=ADDRESSES {
        zone += &format!("many.cdn.example 60 IN A 198.51.100.{n}\n");
    }
    std::fs::write(folder.join("zone"), zone)?;
    let settings = format!(
        "server:\n interface: {}\n do-daemonize: no\n username: \"\"\n chroot: \"\"\n pidfile: \"\"\n \
         use-syslog: no\n access-control: 0.0.0.0/0 allow\n directory: \"{folder}\"\n \
         minimal-responses: no\n module-config: \"iterator\"\n local-zone: \"test.\" nodefault\n\
         remote-control:\n control-enable: no\n\
         auth-zone:\n name: \"test.\"\n zonefile: \"{folder}/zone\"\n for-downstream: yes\n for-upstream: yes\n",
        RESOLVER.ip(),
        folder = folder.display(),
    );
    let file = folder.join("unbound.conf");
    std::fs::write(&file, settings)?;
    let mut command = Command::new("unbound");
    command.arg("-d").arg("-c").arg(&file);
    enter(&mut command, web.world.bed.network.peer.try_clone()?, None);
    Running::start(command)
}

fn real_resolver(
    labelled: bool,
    program: &str,
    package: &str,
    start: fn(&Web, &Path) -> Result<Running>,
) -> Result<Claim> {
    if found(program).is_none() {
        return Ok(missing(program, package));
    }
    let world = World::without_resolver(labelled)?;
    let folder = world.bed.folder.path().to_path_buf();
    let server = TlsServer::start(&world.bed.network, &folder, &[API], PORT, Groups::Usual)?;
    let web = Web { world, server };
    let mut resolver = start(&web, &folder)?;
    until_it_answers(&web, &mut resolver)?;
    let system = |name: &str| Step::System { name: name.into(), port: PLAIN };
    let last = IpAddr::from([198, 51, 100, ADDRESSES as u8]);
    let steps = [
        system(API),
        system(BELOW),
        system(MANY),
        ask(MANY, mcp_sensor_tests::dns::message::A),
        ask_tcp(MANY, mcp_sensor_tests::dns::message::A),
        connect(last, PLAIN),
        connect(ip(SIX), PLAIN),
        system(OTHER),
    ];
    let prepare = |command: &mut Command| with_resolver(command, &folder, RESOLVER.ip());
    let ran: Ran = web.world.run_as(NAMED, &steps, prepare, SESSION)?;
    for (step, outcome) in steps.iter().zip(&ran.outcomes).take(steps.len() - 1) {
        ensure!(outcome.answered(), "{step:?}: {}", outcome.report);
    }
    let counts: Vec<_> = ran.outcomes.iter().map(|o| o.addresses.len()).collect();
    ensure!(counts[..3] == [2, 2, ADDRESSES as usize], "addresses found: {counts:?}");
    ensure!(ran.last().answered() != labelled, "{OTHER}: {}", ran.last().report);
    if labelled {
        web.world.expect_name_event("name_no_rule", OTHER)?;
    }
    Ok(Claim::Holds)
}

fn until_it_answers(web: &Web, resolver: &mut Running) -> Result<()> {
    use mcp_sensor_tests::dns::message::{A, Message};
    let deadline = Instant::now() + LIMIT;
    let query = Message::query(1, API, A).to_bytes();
    loop {
        // From the peer's own side: it is not the sensor's affair.
        let from = mcp_sensor_tests::network::DENIED_V4.into();
        let client = mcp_sensor_tests::peer::Client::udp(&web.world.bed.network, from, RESOLVER)?;
        if let Ok(Some(_)) = client.ask(&query, Duration::from_millis(100)) {
            return Ok(());
        }
        if resolver.is_over()? || Instant::now() > deadline {
            bail!("the resolver does not answer: {:?}", resolver.line(Duration::from_millis(100)));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Answer {
    ok: bool,
    text: String,
}

/// A client, unlabelled, that has each URL fetched by a server of its own.
fn fetched(web: &Web, urls: &[(&str, String)], resolver: IpAddr) -> Result<BTreeMap<String, Answer>> {
    let venv = installed("venv")?;
    let program: PathBuf = venv.join("bin/mcp-server-fetch");
    let calls: Vec<Value> = urls
        .iter()
        .map(|(name, url)| {
            json!({
                "name": name,
                "command": [program, "--allow-private-ips", "--ignore-robots-txt"],
                "tool": "fetch",
                "arguments": {"url": url},
            })
        })
        .collect();
    let mut command = web.world.bed.command(venv.join("bin/python"))?;
    command.arg(script("client.py")).arg(Value::from(calls).to_string());
    command.env("SSL_CERT_FILE", &web.server.ca);
    with_resolver(&mut command, web.world.bed.folder.path(), resolver)?;
    let done = Running::start(command)?.finish(SESSION)?;
    let answers: BTreeMap<_, _> = done
        .lines
        .iter()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .map(|v| {
            let text = |key: &str| v[key].as_str().unwrap_or("").to_string();
            (text("name"), Answer { ok: v["ok"] == true, text: text("text") })
        })
        .collect();
    ensure!(answers.len() == urls.len(), "the client says {:?}: {}", done.lines, done.stderr);
    Ok(answers)
}

/// The way out by name, and the ways around it. With another SNI than the
/// name's, see `names_tls`: this server has no such option.
fn fetch(labelled: bool) -> Result<Claim> {
    if found("python3").is_none() {
        return Ok(missing("python3", "python3 python3-venv"));
    }
    let web = Web::new(labelled)?;
    let answers = fetched(&web, &[("by name", format!("https://{API}/"))], RESOLVER.ip())?;
    let by_name = &answers["by name"];
    ensure!(by_name.ok && by_name.text.contains(PAGE), "by name: {}", by_name.text);
    web.world.bed.frames()?;
    let ways = [
        ("by address", format!("https://{ONE}/")),
        ("by another name", format!("https://{OTHER}/")),
        ("without TLS", format!("http://{API}:{PORT}/")),
    ];
    let answers = fetched(&web, &ways, RESOLVER.ip())?;
    let foreign = fetched(&web, &[("resolver", format!("https://{API}/"))], FOREIGN.ip())?;
    if labelled {
        for (way, answer) in answers.iter().chain(&foreign) {
            ensure!(!answer.ok && !answer.text.contains(PAGE), "{way}: {}", answer.text);
        }
        let ran = Ran { outcomes: Vec::new(), frames: web.world.bed.frames()? };
        for address in [ONE, SIX] {
            let bytes = ran.payload_to((ip(address), PORT).into());
            ensure!(bytes == 0, "{bytes} bytes to {address}");
        }
        ensure!(web.world.foreign.bytes() == 0, "the other resolver was asked");
        ensure!(!web.world.resolver.asked().iter().any(|q| q.is_for(OTHER)), "{OTHER} was asked");
        let sensor = web.world.sensor.as_ref().expect("labelled");
        for reason in ["name_no_rule", "foreign_resolver"] {
            sensor
                .events()
                .wait_for(reason, mcp_sensor_tests::sensor::SOON, |e| e.is_of_a_name("fetch", reason))?;
        }
        sensor.events().wait_for("plain HTTP", mcp_sensor_tests::sensor::SOON, |e| {
            e.is_denial_of("fetch") && e.text("reason") == "sni"
        })?;
    } else {
        for way in ["by address", "by another name"] {
            ensure!(answers[way].text.contains(PAGE), "proves nothing: {way}: {}", answers[way].text);
        }
        ensure!(web.server.hears("GET / HTTP/1.1"), "proves nothing: plain HTTP does not arrive");
        ensure!(foreign["resolver"].text.contains(PAGE), "proves nothing: {}", foreign["resolver"].text);
    }
    Ok(Claim::Holds)
}
