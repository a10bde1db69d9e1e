//! The start of connections to addresses that were learned by name: the TLS
//! ClientHello must name it. The reading itself is `sensor_common::tls`.

use crate::handover::{Note, handed};
use crate::packet;
use crate::scratch::{self, Scratch};
use crate::{name, record, traffic};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_skb_load_bytes};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use sensor_common::dns::Bytes;
use sensor_common::policy::Reason;
use sensor_common::record::{Hook, Loss, VERDICT_DENY};
use sensor_common::socket::SOCKET_HELLO;
use sensor_common::tls::{HELLO_BYTES, PEEK_BYTES, Reader, STEPS, Step, looks_like_hello};

struct Work {
    scratch: *mut Scratch,
}

struct Peek([u8; PEEK_BYTES as usize]);

impl Bytes for Peek {
    #[inline(always)]
    fn at(&self, at: u32) -> u8 {
        if at < PEEK_BYTES { self.0[at as usize] } else { 0 }
    }
}

/// `About::done`
const READ: u8 = 1;
const ENCRYPTED: u8 = 2;

/// Holds what a connection sends to the name.
#[cgroup_skb(egress)]
pub fn tls_hello(ctx: SkBuffContext) -> i32 {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    let verdict = read_hello(skb);
    if verdict == 0 {
        traffic::denied(skb, true);
    }
    verdict
}

#[inline(always)]
fn read_hello(skb: *mut __sk_buff) -> i32 {
    let note = Note::read(skb);
    let mut packet = packet::EMPTY;
    let Some((_, stored)) = handed(skb, &mut packet) else { return 0 };
    // SAFETY: a field of the context.
    let len = unsafe { (*skb).len };
    let size = len.wrapping_sub(packet.payload);
    if size == 0 || size > len {
        return 1;
    }
    // SAFETY: the value lives as long as the socket.
    let s = unsafe { &mut *stored };
    // After the first hello, whatever looks like another (HelloRetryRequest) is
    // read as one.
    if s.flags & SOCKET_HELLO != 0 && !hello_again(skb, packet.payload, size) {
        return 1;
    }
    let Some((number, scratch)) = scratch::take() else {
        record::lost(Loss::NameBuffer, 1);
        return note.unread();
    };
    // SAFETY: the buffer is this run's alone.
    let work = unsafe { &mut *scratch };
    name::about(&mut work.about, skb, s, &note, &packet);
    work.about.port = packet.destination_port;
    work.about.own_port = packet.source_port;
    work.name.data.text = [0; sensor_common::name::NAME_BYTES];
    let size = if size > HELLO_BYTES { HELLO_BYTES } else { size };
    work.tls = Reader::new(size);
    if work.bytes.load(skb, packet.payload, size) {
        let mut context = Work { scratch };
        // SAFETY: the callback and its context outlive the call.
        unsafe { bpf_loop(STEPS, step as *mut c_void, (&raw mut context).cast(), 0) };
    }
    let mut verdict = 1;
    if work.about.done != READ || !name::leads_to_peer(work, number) {
        let reason = if work.about.done == ENCRYPTED { Reason::Ech } else { Reason::Sni };
        work.about.reason = reason as u8;
        // SAFETY: plain integers, both ways.
        let concluded = unsafe { name::conclude_name(number, Hook::Egress as u32, 0) };
        verdict = (concluded != VERDICT_DENY as u32) as i32;
    }
    scratch::give(number);
    if verdict == 1 {
        s.flags |= SOCKET_HELLO;
    }
    verdict
}

#[inline(always)]
fn hello_again(skb: *mut __sk_buff, at: u32, size: u32) -> bool {
    if size < PEEK_BYTES {
        return false;
    }
    let mut peek = MaybeUninit::<Peek>::uninit();
    // SAFETY: the helper writes all bytes or fails.
    unsafe {
        bpf_skb_load_bytes(skb.cast(), at, peek.as_mut_ptr().cast(), PEEK_BYTES) != 0
            || looks_like_hello(&peek.assume_init())
    }
}

extern "C" fn step(_index: u32, work: *mut Work) -> i64 {
    // SAFETY: the loop's own context; the buffer is this run's alone.
    let scratch = unsafe { &mut *(*work).scratch };
    scratch.about.done = match scratch.tls.step(&scratch.bytes, &mut scratch.name.data.text) {
        Step::More => return 0,
        Step::Done => READ,
        Step::Encrypted => ENCRYPTED,
        Step::Unread => 0,
    };
    1
}
