//! Benchmark baseline: programs that say yes, on the hooks that the sensor uses.
#![no_std]
#![allow(clippy::needless_pass_by_value, reason = "aya's macros hand contexts over by value")]
#![no_main]

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr, cgroup_sockopt, raw_tracepoint},
    programs::{RawTracePointContext, SkBuffContext, SockAddrContext, SockContext, SockoptContext},
};

#[cgroup_sock(sock_create)]
fn empty_create(_: SockContext) -> i32 {
    1
}

#[cgroup_sock_addr(connect4)]
fn empty_connect4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(connect6)]
fn empty_connect6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(sendmsg4)]
fn empty_sendmsg4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(sendmsg6)]
fn empty_sendmsg6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(bind4)]
fn empty_bind4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(bind6)]
fn empty_bind6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sockopt(setsockopt)]
fn empty_setsockopt(_: SockoptContext) -> i32 {
    1
}

#[cgroup_skb(egress)]
fn empty_egress(_: SkBuffContext) -> i32 {
    1
}

#[cgroup_skb(ingress)]
fn empty_ingress(_: SkBuffContext) -> i32 {
    1
}

#[raw_tracepoint(tracepoint = "sched_process_fork")]
fn empty_fork(_: RawTracePointContext) -> i32 {
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
fn empty_exec(_: RawTracePointContext) -> i32 {
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
fn empty_exit(_: RawTracePointContext) -> i32 {
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
