//! Processes that try to shed their label. The attempt itself is a plain one.

use anyhow::{Result, ensure};
use mcp_sensor_tests::attempts;
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::network::Family;
use mcp_sensor_tests::peer::PORT;
use mcp_sensor_tests::policy::{NONE, OPEN_ARGUMENT, Policy};
use mcp_sensor_tests::run::Running;
use mcp_sensor_tests::sensor::{SOON, Sensor};
use mcp_sensor_tests::spec::must;
use std::time::{Duration, Instant};

attempts! {
    connect_from_a_thread: "as-thread" ["tcp-connect"], Tcp, Passes, [v4 v6];
    connect_after_the_main_thread_has_exited: "as-orphan-thread" ["tcp-connect"], Tcp, Passes, [v4 v6];
    sendto_after_the_main_thread_has_exited: "as-orphan-thread" ["udp-sendto"], Udp, Passes, [v4 v6];
    connect_after_double_fork: "as-daemon" ["tcp-connect"], Tcp, Passes, [v4 v6];
    sendto_after_double_fork: "as-daemon" ["udp-sendto"], Udp, Passes, [v4 v6];
    connect_after_setsid: "as-session-leader" ["tcp-connect"], Tcp, Passes, [v4];
    sendto_after_setsid: "as-session-leader" ["udp-sendto"], Udp, Passes, [v6];
    connect_after_vfork: "as-vforked" ["tcp-connect"], Tcp, Passes, [v4];
    sendto_after_vfork: "as-vforked" ["udp-sendto"], Udp, Passes, [v6];
    connect_by_a_sibling: "as-sibling" ["tcp-connect"], Tcp, Passes, [v4];
    sendto_by_a_sibling: "as-sibling" ["udp-sendto"], Udp, Passes, [v6];
    connect_after_exec: "as-exec" ["tcp-connect"], Tcp, Passes, [v4 v6];
    connect_with_the_argv_of_an_unrestricted_server:
        "as-exec" ["tcp-connect" "%mcp-unrestricted-server"], Tcp, Passes, [v4 v6];
    sendto_with_the_argv_of_an_unrestricted_server:
        "as-exec" ["udp-sendto" "%mcp-unrestricted-server"], Udp, Passes, [v4 v6];
    connect_after_exec_by_a_second_thread:
        "as-thread-exec" ["tcp-connect" "%mcp-unrestricted-server"], Tcp, Passes, [v4];
    sendto_after_exec_by_a_second_thread:
        "as-thread-exec" ["udp-sendto" "%mcp-unrestricted-server"], Udp, Passes, [v6];
    connect_from_a_program_without_a_path:
        "as-memfd" ["tcp-connect" "%mcp-unrestricted-server"], Tcp, Passes, [v4];
    sendto_after_a_user_and_network_namespace_of_its_own:
        "after-own-namespace", Udp, Passes, [v4 v6];
}

#[test]
fn the_table_names_the_unrestricted_servers_argument() {
    // `attempts!` takes literals only.
    assert_eq!(OPEN_ARGUMENT.strip_prefix("--"), Some("mcp-unrestricted-server"));
}

fn sends_to_itself(server: Option<&str>, to: &str) -> Result<bool> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &Policy::standard())?;
    let arguments = ["in-own-namespace", "--to", to, "--port", "7001", "--", "udp-sendto"].map(String::from);
    let command = match server {
        Some(server) => bed.labelled_attempt(&sensor, server, &arguments)?,
        None => bed.attempt(&arguments)?,
    };
    Ok(bed.try_out(command)?.report.errno().is_none())
}

#[test]
fn loopback_in_a_namespace_of_its_own_is_denied_under_none() {
    must(|| {
        for to in ["127.0.0.1", "::1"] {
            ensure!(sends_to_itself(None, to)?, "proves nothing: unlabelled, {to} does not work");
            ensure!(!sends_to_itself(Some(NONE), to)?, "{to} works under none");
        }
        Ok(())
    });
}

#[test]
fn five_thousand_short_lived_children_send_nothing_and_leave_no_label() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let before = sensor.labelled_tasks()?;
        let to = Family::V4.denied().to_string();
        let children = |count: &str| {
            ["as-many-children", "--to", &to, "--port", &PORT.to_string(), "--", "udp-burst", count]
                .map(String::from)
        };
        let command = bed.labelled_attempt(&sensor, NONE, &children("5000"))?;
        let done = Running::start(command)?.finish(Duration::from_secs(120))?;
        let report: mcp_sensor_tests::report::Report = serde_json::from_str(done.lines.last().unwrap())?;
        ensure!(report.errno() == Some(libc::EPERM), "the children were not all denied: {report}");
        let frames = bed.frames()?;
        ensure!(frames.is_empty(), "{} frames, first {:?}", frames.len(), frames[0]);
        let deadline = Instant::now() + SOON;
        while sensor.labelled_tasks()? > before {
            ensure!(
                Instant::now() < deadline,
                "{} labels are left, {before} before",
                sensor.labelled_tasks()?
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!(bed.frames()?.is_empty(), "frames after the last child");

        let tried = bed.try_out(bed.attempt(&children("50"))?)?;
        ensure!(tried.frames.len() >= 50, "proves nothing: unlabelled, only {} frames", tried.frames.len());
        Ok(())
    });
}

#[test]
fn a_move_to_a_cgroup_of_its_own_is_no_way_out() {
    must(|| {
        let bed = Bed::new()?;
        let sensor = Sensor::start(&bed, &Policy::standard())?;
        let to = Family::V4.denied().to_string();
        let folder = bed.cgroup.path().to_str().unwrap();
        for name in ["tcp-connect", "udp-sendto"] {
            let all = ["in-child-cgroup", "--to", &to, "--port", &PORT.to_string(), "--", name, folder]
                .map(String::from);
            let tried = bed.try_out(bed.labelled_attempt(&sensor, NONE, &all)?)?;
            ensure!(tried.report.errno() == Some(libc::EPERM), "{}", tried.report);
            ensure!(tried.frames.is_empty(), "{:?}", tried.frames);
            let tried = bed.try_out(bed.attempt(&all)?)?;
            ensure!(tried.report.answered(), "proves nothing: unlabelled, {}", tried.report);
        }
        Ok(())
    });
}
