//! From the program that judges a packet to those that read names in it
//! (`dns`, `tls`): verified apart, on a stack of their own.

use crate::dns;
use crate::packet::{ALLOW, Packet, parse};
use crate::scratch::bounded;
use crate::socket::storage;
use crate::verdict::Judged;
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::bpf_sk_fullsock;
use aya_ebpf::macros::map;
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::sk_buff::{SkBuff, SkBuffContext};
use sensor_common::addr::Addr;
use sensor_common::policy::Reason;
use sensor_common::socket::Socket;

/// The index is what for.
#[map]
static OUT_PROGRAMS: ProgramArray = ProgramArray::with_max_entries(2, 0);
#[map]
static IN_PROGRAMS: ProgramArray = ProgramArray::with_max_entries(1, 0);
/// `dns_query`
pub(crate) const QUERY: u32 = 0;
/// `tls_hello`
pub(crate) const HELLO: u32 = 1;
/// `dns_answer`
const ANSWER: u32 = 0;

/// Leaves the verdict to the program that reads names. It knows what is in
/// [`Note`]; without it nothing leaves that is held to anything.
#[inline(always)]
pub(crate) fn hand_over(skb: *mut __sk_buff, program: u32, packet: &Packet, judged: &Judged) -> i32 {
    Note::write(skb, judged, &packet.destination);
    // SAFETY: `skb` is the program's context.
    unsafe { OUT_PROGRAMS.tail_call(&SkBuffContext { skb: SkBuff { skb } }, program) };
    Note { reason: judged.decision.reason as u8, audit: judged.audit, peer: packet.destination }.unread()
}

/// What comes from port 53 may be learned from; it passes in any case.
#[inline(always)]
pub(crate) fn received(skb: *mut __sk_buff, packet: &Packet, judged: &Judged) -> i32 {
    if packet.source_port == dns::PORT {
        Note::write(skb, judged, &packet.source);
        // SAFETY: `skb` is the program's context.
        unsafe { IN_PROGRAMS.tail_call(&SkBuffContext { skb: SkBuff { skb } }, ANSWER) };
    }
    ALLOW
}

/// What the judging program tells the one it hands a packet to, in the packet's
/// `cb`.
pub(crate) struct Note {
    pub reason: u8,
    pub audit: bool,
    /// Who the socket talks to, before translation; its port is 53, or the
    /// packet's.
    pub peer: Addr,
}

impl Note {
    #[inline(always)]
    fn write(skb: *mut __sk_buff, judged: &Judged, peer: &Addr) {
        // SAFETY: fields of the context, each written on its own.
        unsafe {
            let cb = (&raw mut (*skb).cb).cast::<u32>();
            cb.write_volatile(judged.decision.reason as u32 | (judged.audit as u32) << 8);
            cb.add(1).write_volatile(peer.0[0]);
            cb.add(2).write_volatile(peer.0[1]);
            cb.add(3).write_volatile(peer.0[2]);
            cb.add(4).write_volatile(peer.0[3]);
        }
    }

    /// The verdict on a packet whose names cannot be read.
    #[inline(always)]
    pub(crate) fn unread(&self) -> i32 {
        let open = self.audit || self.reason == Reason::Unrestricted as u8;
        bounded(open as u64, 1) as i32
    }

    #[inline(always)]
    pub(crate) fn read(skb: *mut __sk_buff) -> Note {
        // SAFETY: fields of the context, each read on its own.
        unsafe {
            let cb = (&raw const (*skb).cb).cast::<u32>();
            let first = cb.read_volatile();
            let word = |i: usize| cb.add(i).read_volatile();
            Note {
                reason: first as u8,
                audit: first >> 8 & 1 != 0,
                peer: Addr([word(1), word(2), word(3), word(4)]),
            }
        }
    }
}

/// The socket and the headers again, for a program that a packet was handed to.
#[inline(always)]
pub(crate) fn handed(skb: *mut __sk_buff, packet: &mut Packet) -> Option<(*mut bpf_sock, *mut Socket)> {
    // SAFETY: a field of the context.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return None;
    }
    // SAFETY: `sk` is not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return None;
    }
    let stored = storage(sk);
    let mut reason = Reason::Malformed;
    if stored.is_null() || !parse(skb, packet, &mut reason) {
        return None;
    }
    Some((sk, stored))
}
