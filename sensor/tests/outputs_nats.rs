//! A collector's output to a real nats-server with JetStream: what the stream
//! holds is what the log holds, whoever dies meanwhile.

mod support;

use mcp_sensor::event::Event;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use support::collector::{batches, event, feed};
use support::denial;
use support::nats::{self, Message, Node};
use support::outputs::Collector;
use support::receiver::certificates;

/// By id; two of one id are an error.
fn by_id(messages: &[Message]) -> BTreeMap<String, Value> {
    let mut map = BTreeMap::new();
    for message in messages {
        let value: Value = serde_json::from_str(&message.text).unwrap();
        assert_eq!(message.subject.rsplit('.').next(), value["type"].as_str());
        assert!(map.insert(message.id.clone(), value).is_none(), "{} came twice", message.id);
    }
    map
}

fn servers(nodes: &[Node]) -> String {
    format!("[{}]", nats::urls(nodes).join(", "))
}

fn mixed(seqs: std::ops::RangeInclusive<u64>) -> Vec<Vec<Event>> {
    let mut all = batches(seqs, 100);
    for event in all.iter_mut().flatten().filter(|e| e.seq.is_multiple_of(3)) {
        event.body = Some(denial("time", 10));
    }
    all
}

#[tokio::test]
async fn the_stream_has_every_event_of_the_log_once_with_type_and_id() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("", |_| ()).await];
    let create = "{replicas: 1, max_bytes: 100000000, duplicate_window: 1m}";
    let settings = format!("nats: {{servers: {}, stream: EVENTS, create: {create}}}", servers(&node));
    let collector = Collector::new(&settings);
    let child = collector.start().await;
    feed(&collector.address(), "web-1", "b1", mixed(1..=1500)).await;
    feed(&collector.address(), "web,2.x", "b1", mixed(1..=700)).await;
    let context = nats::jetstream(&node).await;
    assert_eq!(nats::wait(&context, "EVENTS", 2200).await, 2200);
    let messages = nats::messages(&context, "EVENTS").await;
    assert_eq!(by_id(&messages), collector.lines());
    assert!(messages.iter().any(|m| m.subject == "mcp-sensor.events.connection"));
    let of_one: Vec<&Message> = messages.iter().filter(|m| m.id.starts_with("web-1/")).collect();
    let order: Vec<u64> = of_one.iter().map(|m| m.id.rsplit('/').next().unwrap().parse().unwrap()).collect();
    assert!(order.is_sorted(), "of one sensor in its order");
    let made = context.get_stream("EVENTS").await.unwrap().cached_info().config.clone();
    assert_eq!((made.max_bytes, made.duplicate_window), (100_000_000, Duration::from_secs(60)));
    let state = collector.until(|s| s.lag == 0 && s.delivered == 2200).await;
    assert_eq!((state.kind.as_str(), state.lost, state.error.as_str()), ("nats", 0, ""));
    drop(child);
}

#[tokio::test]
async fn what_is_published_again_is_not_stored_again() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("", |_| ()).await];
    let context = nats::jetstream(&node).await;
    nats::create(&context, nats::events(1)).await;
    let collector = Collector::new(&format!("nats: {{servers: {}}}", servers(&node)));
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=1000, 100)).await;
    nats::wait(&context, "EVENTS", 1000).await;
    child.kill().await.unwrap();
    // Without its cursor it begins anew.
    std::fs::remove_file(collector.dir.path().join("d/outputs/bus.json")).ok();
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1001..=1100, 100)).await;
    let state = collector.until(|s| s.delivered == 1100 && s.lag == 0).await;
    assert_eq!((state.lost, nats::wait(&context, "EVENTS", 1100).await), (0, 1100), "{state:?}");
    assert_eq!(by_id(&nats::messages(&context, "EVENTS").await), collector.lines());
}

#[tokio::test]
async fn a_server_and_a_collector_that_are_killed_in_mid_stream_lose_nothing() {
    if nats::missing() {
        return;
    }
    let mut node = [nats::start("", |_| ()).await];
    let context = nats::jetstream(&node).await;
    nats::create(&context, nats::events(1)).await;
    let collector = Collector::new(&format!("nats: {{servers: {}}}", servers(&node)));
    let mut child = collector.start().await;
    let mut next = 1;
    for round in 0..4u64 {
        feed(&collector.address(), "a", "b", batches(next..=next + 1999, 100)).await;
        next += 2000;
        // Something is on its way.
        nats::wait(&context, "EVENTS", 1 + round * 500).await;
        if round.is_multiple_of(2) {
            node[0].kill().await;
            feed(&collector.address(), "a", "b", batches(next..=next + 499, 100)).await;
            next += 500;
            collector.until(|s| !s.error.is_empty()).await;
            node[0].start();
        } else {
            child.kill().await.unwrap();
            child = collector.start().await;
        }
    }
    let all = next - 1;
    assert_eq!(nats::wait(&context, "EVENTS", all).await, all);
    assert_eq!(by_id(&nats::messages(&context, "EVENTS").await), collector.lines());
    let state = collector.until(|s| s.lag == 0 && s.error.is_empty()).await;
    assert_eq!(state.lost, 0);
}

#[tokio::test]
async fn one_of_three_servers_killed_under_load_loses_nothing_and_doubles_nothing() {
    if nats::missing() {
        return;
    }
    let mut nodes = nats::cluster().await;
    let context = nats::jetstream(&nodes).await;
    nats::create(&context, nats::events(3)).await;
    let collector = Collector::new(&format!("nats: {{servers: {}, stream: EVENTS}}", servers(&nodes)));
    let _child = collector.start().await;
    let address = collector.address();
    let load = tokio::spawn(async move { feed(&address, "a", "b", batches(1..=20_000, 100)).await });
    nats::wait(&context, "EVENTS", 2000).await;
    let leader = nats::leader(&context, "EVENTS").await;
    nodes[leader].kill().await;
    load.await.unwrap();
    assert_eq!(nats::wait(&context, "EVENTS", 20_000).await, 20_000);
    assert_eq!(by_id(&nats::messages(&context, "EVENTS").await), collector.lines());
    let state = collector.until(|s| s.lag == 0 && s.error.is_empty()).await;
    assert_eq!(state.lost, 0);
    nodes[leader].start();
}

#[tokio::test]
async fn an_event_that_is_too_large_is_told_in_its_place_and_counted() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("max_payload: 4096\n", |_| ()).await];
    let context = nats::jetstream(&node).await;
    nats::create(&context, nats::events(1)).await;
    let collector = Collector::new(&format!("nats: {{servers: {}}}", servers(&node)));
    let _child = collector.start().await;
    let mut batch: Vec<Event> = (1..=10).map(event).collect();
    batch[4].body = Some(denial("time", 9000));
    feed(&collector.address(), "a", "b", vec![batch]).await;
    let state = collector.until(|s| s.lost == 1 && s.lag == 0).await;
    assert_eq!(state.lost_by_reason.get("too_large"), Some(&1), "{state:?}");
    assert_eq!(nats::wait(&context, "EVENTS", 10).await, 10);
    let mut got = by_id(&nats::messages(&context, "EVENTS").await);
    let (_, told) = got.pop_last().filter(|(id, _)| id.starts_with("output:bus/too_large/")).unwrap();
    assert_eq!(
        (&told["type"], &told["where"], &told["reason"], &told["count"], &told["denials"]),
        (&"loss".into(), &"output:bus".into(), &"too_large".into(), &1.into(), &1.into())
    );
    let mut expected = collector.lines();
    expected.remove("a/b/5").unwrap();
    assert_eq!(got, expected);
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_named_and_what_waits_goes_when_it_is() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("", |_| ()).await];
    let collector = Collector::new(&format!("nats: {{servers: {}, stream: EVENTS}}", servers(&node)));
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=10, 10)).await;
    let state = collector.until(|s| !s.error.is_empty()).await;
    assert!(
        state.error.contains("no stream takes mcp-sensor.events.>: make EVENTS with this subject"),
        "{state:?}"
    );
    let context = nats::jetstream(&node).await;
    let other = async_nats::jetstream::stream::Config { name: "OTHER".to_owned(), ..nats::events(1) };
    nats::create(&context, other).await;
    let state = collector.until(|s| s.error.contains("expected stream")).await;
    assert_eq!(
        (state.delivered, nats::wait(&context, "OTHER", 0).await),
        (0, 0),
        "another stream takes them"
    );
    context.delete_stream("OTHER").await.unwrap();
    nats::create(&context, nats::events(1)).await;
    nats::wait(&context, "EVENTS", 10).await;
    collector.until(|s| s.error.is_empty() && s.lag == 0).await;
}

#[tokio::test]
async fn a_server_that_asks_for_certificate_and_password_gets_both_or_nothing() {
    if nats::missing() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    certificates(files.path());
    let at = |name: &str| files.path().join(name).display().to_string();
    // No right but to publish events and to hear what became of them.
    let config = format!(
        "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", verify: true }}\n\
         authorization {{ users: [{{user: admin, password: admin}}, {{user: sensor, password: secret,\n\
         permissions: {{publish: \"mcp-sensor.events.>\", subscribe: \"_INBOX.>\"}}}}] }}\n",
        at("server.pem"),
        at("server-key.pem"),
        at("ca.pem"),
    );
    let node = [nats::start(&config, |_| ()).await];
    let port = node[0].port;
    let admin = async_nats::ConnectOptions::with_user_and_password("admin".to_owned(), "admin".to_owned())
        .add_root_certificates(at("ca.pem").into())
        .add_client_certificate(at("client.pem").into(), at("client-key.pem").into());
    let admin = admin.connect(format!("tls://127.0.0.1:{port}")).await.unwrap();
    let context = async_nats::jetstream::new(admin);
    nats::create(&context, nats::events(1)).await;
    std::fs::write(files.path().join("password"), "wrong\n").unwrap();
    let user = format!("user: sensor, password: \"file:{}\"", at("password"));
    let tls = format!("ca: {}, cert: {}, key: {}", at("ca.pem"), at("client.pem"), at("client-key.pem"));
    let servers = format!("servers: [\"tls://127.0.0.1:{port}\"], stream: EVENTS");
    let collector = Collector::new(&format!("nats: {{{servers}, {user}, ca: {}}}", at("ca.pem")));
    let mut child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=10, 10)).await;
    let state = collector.until(|s| !s.error.is_empty()).await;
    assert!(state.error.contains(&format!("127.0.0.1:{port}")), "no certificate: {state:?}");
    child.kill().await.unwrap();
    collector.write(&format!("nats: {{{servers}, {user}, {tls}}}"));
    let _child = collector.start().await;
    let state = collector.until(|s| s.error.contains("authorization")).await;
    assert_eq!(state.delivered, 0);
    // The file is read again.
    std::fs::write(files.path().join("password"), "secret\n").unwrap();
    let state = collector.until(|s| s.lag == 0 && s.error.is_empty() && s.delivered == 10).await;
    assert_eq!((state.lost, nats::wait(&context, "EVENTS", 10).await), (0, 10));
}

#[tokio::test]
async fn a_server_that_asks_for_a_token_gets_it_from_the_file() {
    if nats::missing() {
        return;
    }
    let node = [nats::start("authorization { token: \"right\" }\n", |_| ()).await];
    let servers = servers(&node);
    let collector = Collector::new("ndjson: {path: none}");
    let file = collector.dir.path().join("token");
    std::fs::write(&file, "wrong\n").unwrap();
    let token = format!("token: \"file:{}\"", file.display());
    collector
        .write(&format!("nats: {{servers: {servers}, stream: EVENTS, {token}, create: {{replicas: 1}}}}"));
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=10, 10)).await;
    let state = collector.until(|s| s.error.contains("authorization")).await;
    assert_eq!(state.delivered, 0);
    // The file is read again.
    std::fs::write(&file, "right\n").unwrap();
    let state = collector.until(|s| s.lag == 0 && s.error.is_empty() && s.delivered == 10).await;
    assert_eq!(state.lost, 0);
    let options = async_nats::ConnectOptions::with_token("right".to_owned());
    let client = options.connect(nats::urls(&node)).await.unwrap();
    assert_eq!(nats::wait(&async_nats::jetstream::new(client), "EVENTS", 10).await, 10);
}

/// A JWT as nats-server takes it, signed with an nkey.
fn jwt(signer: &nkeys::KeyPair, subject: &nkeys::KeyPair, kind: &str, more: &str) -> String {
    use base64::Engine as _;
    let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let claims = format!(
        r#"{{"jti":"{kind}","iat":1700000000,"iss":"{}","name":"{kind}","sub":"{}","nats":{{{more}"type":"{kind}","version":2}}}}"#,
        signer.public_key(),
        subject.public_key()
    );
    let signed = format!("{}.{}", encode(r#"{"typ":"JWT","alg":"ed25519-nkey"}"#), encode(&claims));
    let signature = signer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test]
async fn a_file_of_credentials_opens_a_server_with_accounts() {
    if nats::missing() {
        return;
    }
    let (operator, system) = (nkeys::KeyPair::new_operator(), nkeys::KeyPair::new_account());
    let (account, user) = (nkeys::KeyPair::new_account(), nkeys::KeyPair::new_user());
    let limits = r#""limits":{"subs":-1,"data":-1,"payload":-1,"imports":-1,"exports":-1,"wildcards":true,"conn":-1,"leaf":-1,"mem_storage":-1,"disk_storage":-1,"streams":-1,"consumer":-1},"#;
    let of_user = r#""subs":-1,"data":-1,"payload":-1,"#;
    let config = format!(
        "operator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload {{\n{}: {}\n{}: {}\n}}\n",
        jwt(&operator, &operator, "operator", ""),
        system.public_key(),
        system.public_key(),
        jwt(&operator, &system, "account", ""),
        account.public_key(),
        jwt(&operator, &account, "account", limits),
    );
    let node = [nats::start(&config, |_| ()).await];
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("user.creds");
    let line = "------";
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{}\n{line}END NATS USER JWT{line}\n\n-----BEGIN USER NKEY SEED-----\n{}\n{line}END USER NKEY SEED{line}\n",
        jwt(&account, &user, "user", of_user),
        user.seed().unwrap()
    );
    let of = |credentials: &str| {
        format!(
            "nats: {{servers: {}, stream: EVENTS, credentials: \"file:{credentials}\", create: {{replicas: 1}}}}",
            servers(&node)
        )
    };
    std::fs::write(&path, credentials).unwrap();
    let collector = Collector::new(&of(path.to_str().unwrap()));
    let _child = collector.start().await;
    feed(&collector.address(), "a", "b", batches(1..=10, 10)).await;
    let state = collector.until(|s| s.delivered == 10 || !s.error.is_empty()).await;
    assert_eq!((state.delivered, state.error.as_str()), (10, ""));
}
