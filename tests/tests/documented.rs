//! Families that are no IP: the cgroup hooks never see them. Without an LSM
//! hook they are open, and SECURITY.md says so. When one of these fails because
//! the way is shut, that text is to change.

use anyhow::{Result, ensure};
use mcp_sensor_tests::bed::{Bed, Tried};
use mcp_sensor_tests::frame::Frame;
use mcp_sensor_tests::policy::{NONE, Policy};
use mcp_sensor_tests::sensor::Sensor;
use mcp_sensor_tests::spec::must;

fn under_none_and_unlabelled(arguments: &[&str]) -> Result<(Tried, Tried)> {
    let bed = Bed::new()?;
    let sensor = Sensor::start(&bed, &Policy::standard())?;
    let arguments: Vec<String> = arguments.iter().map(|a| a.to_string()).collect();
    let labelled = bed.try_out(bed.labelled_attempt(&sensor, NONE, &arguments)?)?;
    let unlabelled = bed.try_out(bed.attempt(&arguments)?)?;
    Ok((labelled, unlabelled))
}

fn is_link_frame(frame: &Frame) -> bool {
    matches!(frame, Frame::Other { ethertype: 0x88b6, .. })
}

fn leaks_with_cap_net_raw(name: &str) -> Result<()> {
    let (labelled, unlabelled) = under_none_and_unlabelled(&[name])?;
    ensure!(unlabelled.frames.iter().any(is_link_frame), "proves nothing: {}", unlabelled.report);
    ensure!(labelled.frames.iter().any(is_link_frame), "no leak any more: {}", labelled.report);
    Ok(())
}

#[test]
fn af_packet_dgram_leaks_with_cap_net_raw_as_documented() {
    must(|| leaks_with_cap_net_raw("packet-send"));
}

#[test]
fn af_packet_raw_leaks_with_cap_net_raw_as_documented() {
    must(|| leaks_with_cap_net_raw("packet-send-raw"));
}

#[test]
fn af_packet_is_refused_by_the_kernel_without_cap_net_raw() {
    must(|| {
        let (labelled, _) = under_none_and_unlabelled(&["packet-send", "--as", "65534"])?;
        ensure!(labelled.report.errno() == Some(libc::EPERM), "{}", labelled.report);
        ensure!(labelled.frames.is_empty(), "{:?}", labelled.frames);
        Ok(())
    });
}

/// The sensor changes nothing about it.
fn same_with_and_without_label(name: &str) -> Result<()> {
    let (labelled, unlabelled) = under_none_and_unlabelled(&[name])?;
    ensure!(
        labelled.report == unlabelled.report,
        "labelled: {}, unlabelled: {}",
        labelled.report,
        unlabelled.report
    );
    ensure!(labelled.frames.is_empty(), "{:?}", labelled.frames);
    Ok(())
}

#[test]
fn af_vsock_is_open_as_documented() {
    must(|| same_with_and_without_label("vsock-bind"));
}

#[test]
fn af_xdp_is_open_as_documented() {
    must(|| same_with_and_without_label("xdp-socket"));
}

#[test]
fn af_netlink_is_open_as_documented() {
    must(|| same_with_and_without_label("netlink-route"));
}
