//! A panic in any task or thread ends the process with a report.

use std::process::Command;
use std::time::Duration;

/// Set in the child, which is this program again: the test that it runs panics.
const CHILD: &str = "MCP_SENSOR_TEST_CHILD";

/// The test runs itself in a process of its own, and looks at its end.
fn is_ended_with_a_report(test: &str, thread: &str, panics: fn()) {
    if std::env::var_os(CHILD).is_some() {
        mcp_sensor::panics::end_the_process();
        panics();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{said}");
    assert!(said.contains("on purpose") && said.contains("tests/panics.rs"), "what and where: {said}");
    assert!(said.contains(&format!("thread `{thread}`")), "which thread: {said}");
}

#[test]
fn a_panic_in_a_task_ends_the_process_with_a_report() {
    is_ended_with_a_report("a_panic_in_a_task_ends_the_process_with_a_report", "worker", || {
        let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("worker").build();
        runtime.expect("runtime").block_on(async {
            let _ = tokio::spawn(async { panic!("on purpose") }).await;
        });
    });
}

#[test]
fn a_panic_in_a_thread_ends_the_process_with_a_report() {
    is_ended_with_a_report("a_panic_in_a_thread_ends_the_process_with_a_report", "rings", || {
        let thread = std::thread::Builder::new().name("rings".to_owned()).spawn(|| panic!("on purpose"));
        let _ = thread.expect("thread").join();
    });
}
