//! A sensor says that it is healthy only while it holds its servers.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::Bed;
use mcp_sensor_tests::link::{detach, pinned};
use mcp_sensor_tests::policy::Policy;
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::must;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Loaded machines included; the sensor looks every two seconds.
const PATIENCE: Duration = Duration::from_secs(60);

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn a_detached_hook_is_told_by_status_probes_and_metrics() {
    must(|| {
        let bed = Bed::new()?;
        // The kernel chooses a port; another may take it before the sensor does.
        let mut tries = 0;
        let (sensor, address) = loop {
            let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
            match Sensor::start_on(
                bed.cgroup.path(),
                &Policy::standard(),
                &["--metrics", &address.to_string()],
            ) {
                Ok(sensor) => break (sensor, address),
                Err(error) => {
                    tries += 1;
                    ensure!(tries < 5, "{error:#}");
                }
            }
        };
        let check = || sensor.command(&["status", "--check"]);
        let healthy = check()?;
        ensure!(healthy.status.code() == Some(0), "{:?} {}", healthy.lines, healthy.stderr);
        ensure!(get(address, "/readyz")?.starts_with("HTTP/1.1 200"));
        let metrics = get(address, "/metrics")?;
        for name in [
            "mcp_sensor_ready 1",
            "mcp_sensor_ring_used_bytes{ring=\"verdicts\"}",
            "mcp_sensor_map_entries{map=\"instances\"}",
            "mcp_sensor_map_capacity{map=\"instances\"} 16384",
            "mcp_sensor_policy_info{hash=",
            "mcp_sensor_build_info{version=",
        ] {
            ensure!(metrics.contains(name), "{name} is not in\n{metrics}");
        }
        detach(&pinned(&sensor.pins(), "egress")?)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let checked = check()?;
            if checked.status.code() == Some(9) {
                ensure!(checked.lines.iter().any(|l| l.contains("`egress`")), "{:?}", checked.lines);
                break;
            }
            ensure!(Instant::now() < deadline, "nobody noticed: {:?}", checked.lines);
            std::thread::sleep(Duration::from_millis(50));
        }
        ensure!(get(address, "/readyz")?.starts_with("HTTP/1.1 503"));
        ensure!(get(address, "/healthz")?.starts_with("HTTP/1.1 200"));
        ensure!(get(address, "/metrics")?.contains("mcp_sensor_ready 0"));
        Ok(())
    });
}
