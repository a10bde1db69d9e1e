//! What unlabelled programs that listen are asked over HTTP, and answer. A listener is known
//! from the first SYN that comes to it, whoever bound it and when; what it
//! accepts is known by a copy. Runs in softirq, and never changes a verdict.

use crate::packet::{self, Packet, parse};
use crate::record;
use crate::scratch::bounded;
use crate::socket::Storage;
use crate::stdio::STDIO;
use crate::{atomic, kernel};
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_get_smp_processor_id, bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_skb_load_bytes,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::LruHashMap;
use sensor_common::TCP;
use sensor_common::label::Label;
use sensor_common::listener::{
    ANSWER_PACKETS, ASKING_PACKETS, BARE_BYTES, Incoming, LOOK_BYTES, LOOKS, Look, Looks, PIECE_BYTES,
    REFILL_NS, Side, Step, is_answer, is_post,
};
use sensor_common::policy::Reason;
use sensor_common::record::{Header, KIND_LOOK, RING_STDIO};
use sensor_common::stdio::{FROM_CLIENT, FROM_SERVER, is_request};

/// BPF_F_NO_PREALLOC, which the type demands, and BPF_F_CLONE.
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "INCOMING")]
static INCOMING: Storage<Incoming, { 1 | 1 << 9 }> = Storage::new();
/// By cookie of the listener. One that is pushed out is looked at anew.
#[map]
static LISTENERS: LruHashMap<u64, Looks> = LruHashMap::with_max_entries(4096, 0);

/// A packet of a socket without a label. All that most of them pay for is one
/// look-up, UDP and bare acknowledgements not even that.
#[inline(always)]
pub(crate) fn passes(skb: *mut __sk_buff, sk: *mut bpf_sock, outbound: bool) {
    // SAFETY: fields of a full socket.
    let (protocol, state) = unsafe { ((*sk).protocol, (*sk).state) };
    if protocol != TCP as u32 {
        return;
    }
    if state == packet::TCP_LISTEN {
        if !outbound && INCOMING.get(sk).is_null() && wanted() {
            begin(skb, sk);
        }
        return;
    }
    // SAFETY: a field of the context.
    if unsafe { (*skb).len } <= BARE_BYTES {
        return;
    }
    let incoming = INCOMING.get(sk);
    if incoming.is_null() {
        return;
    }
    // SAFETY: not null; the value lives as long as the socket.
    let packets = unsafe { if outbound { (*incoming).answer.packets } else { (*incoming).asking.packets } };
    if packets > 0 {
        look(skb, incoming, outbound);
    }
}

#[inline(always)]
fn wanted() -> bool {
    matches!(kernel::state(), Some(s) if s.candidates != 0)
}

/// The first packet to a listener.
#[inline(always)]
fn begin(skb: *mut __sk_buff, sk: *mut bpf_sock) {
    let incoming = INCOMING.get_or_zeroed(sk);
    if !incoming.is_null() {
        // SAFETY: not null, and lives as long as the socket; two that begin at
        // once write the same. `skb` is the program's context.
        unsafe {
            (*incoming).listener = bpf_get_socket_cookie(skb.cast());
            (*incoming).asking.packets = ASKING_PACKETS;
        }
    }
}

/// A packet of a connection that is looked at. Out of line, to keep the caller's
/// stack small.
#[inline(never)]
fn look(skb: *mut __sk_buff, incoming: *mut Incoming, outbound: bool) {
    // SAFETY: not null, and lives as long as the socket. The packets of a
    // connection come one after the other; where they do not, a look breaks off.
    let incoming = unsafe { &mut *incoming };
    let listener = incoming.listener;
    let side = if outbound { &mut incoming.answer } else { &mut incoming.asking };
    side.packets = side.packets.wrapping_sub(1);
    let mut packet = packet::EMPTY;
    if !parse(skb, &mut packet, &mut Reason::Malformed) {
        return;
    }
    // SAFETY: a field of the context.
    let len = unsafe { (*skb).len };
    let size = len.wrapping_sub(packet.payload);
    if size == 0 || size > len {
        return;
    }
    let mut first = [0u8; 5];
    let mut sequence = 0u32;
    let sequence_at = if packet.v6 { 44 } else { 24 };
    // SAFETY: the helper writes as many bytes as it is told, or fails.
    unsafe {
        bpf_skb_load_bytes(skb.cast(), packet.payload, first.as_mut_ptr().cast(), 5);
        if bpf_skb_load_bytes(skb.cast(), sequence_at, (&raw mut sequence).cast(), 4) != 0 {
            return;
        }
    }
    let sequence = u32::from_be(sequence);
    if !outbound
        && side.packets == ASKING_PACKETS - 1
        && !is_request([first[0], first[1], first[2], first[3]])
    {
        side.packets = 0; // of another protocol
        return;
    }
    let begins = if outbound { is_answer(first) } else { is_post(first) };
    match side.step(sequence, begins) {
        Step::Pass => return,
        Step::GoOn => {}
        Step::Begin => {
            side.taken = 0;
            if !outbound {
                if !wanted() || !take_look(listener) {
                    missed();
                    return;
                }
                incoming.answer = Side { packets: ANSWER_PACKETS, next: 0, taken: 0 };
            }
        }
    }
    let side = if outbound { &mut incoming.answer } else { &mut incoming.asking };
    side.next = sequence.wrapping_add(size);
    let mut at = packet.payload;
    let mut left = size;
    let mut pieces = 0;
    while pieces < LOOK_BYTES / PIECE_BYTES as u32 {
        let room = LOOK_BYTES.wrapping_sub(side.taken);
        let mut n = if left < room { left } else { room };
        if n > PIECE_BYTES as u32 {
            n = PIECE_BYTES as u32;
        }
        if n == 0 {
            break;
        }
        if !put(skb, listener, side.taken, &packet, outbound, at, n) {
            missed();
            side.taken = LOOK_BYTES;
            return;
        }
        side.taken = side.taken.wrapping_add(n);
        at = at.wrapping_add(n);
        left = left.wrapping_sub(n);
        pieces += 1;
    }
    if left > 0 {
        side.taken = LOOK_BYTES;
    }
}

#[repr(C)]
struct Piece {
    look: Look,
    data: [u8; PIECE_BYTES],
}

/// One record. False: there is no room, or the bytes cannot be read.
#[inline(always)]
fn put(
    skb: *mut __sk_buff,
    listener: u64,
    position: u32,
    packet: &Packet,
    outbound: bool,
    at: u32,
    n: u32,
) -> bool {
    let (peer, peer_port, port) = if outbound {
        (packet.destination, packet.destination_port, packet.source_port)
    } else {
        (packet.source, packet.source_port, packet.destination_port)
    };
    let Some(mut entry) = STDIO.reserve::<Piece>(0) else { return false };
    let piece = entry.as_mut_ptr();
    // 1..=PIECE_BYTES, seen by the verifier on the very register.
    let len = bounded(n.wrapping_sub(1) as u64, PIECE_BYTES as u64 - 1) as u32 + 1;
    // SAFETY: the record is this program's until it is submitted; the helper
    // writes `len` bytes, or fails.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), at, (&raw mut (*piece).data).cast(), len) != 0 {
            entry.discard(0);
            return false;
        }
        (*piece).look = Look {
            header: Header {
                kind: KIND_LOOK,
                size: size_of::<Piece>() as u16,
                cpu: bpf_get_smp_processor_id(),
                seq: record::next_seq(RING_STDIO),
                boottime: bpf_ktime_get_boot_ns(),
                label: Label::NONE,
                tgid: 0,
                tid: 0,
                uid: 0,
                generation: 0,
            },
            listener,
            connection: bpf_get_socket_cookie(skb.cast()),
            peer,
            peer_port: peer_port as u32,
            port: port as u32,
            position,
            len,
            direction: if outbound { FROM_SERVER } else { FROM_CLIENT },
            _pad: 0,
        };
    }
    entry.submit(0);
    true
}

#[inline(always)]
fn missed() {
    if let Some(counts) = kernel::counts() {
        // SAFETY: an aligned word in a map value.
        atomic::add(unsafe { &raw mut (*counts).looks_missed }, 1);
    }
}

/// A busy API is looked at now and then, and what is known not at all.
#[inline(always)]
fn take_look(listener: u64) -> bool {
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let Some(looks) = LISTENERS.get_ptr_mut(listener) else {
        let looks = Looks { tokens: LOOKS - 1, refilled: now, known: 0 };
        return LISTENERS.insert(listener, looks, 0).is_ok();
    };
    // SAFETY: aligned words in a map value; two CPUs that refill at once give at
    // most one refill too many.
    unsafe {
        if (*looks).known != 0 {
            return false;
        }
        if now.wrapping_sub((*looks).refilled) > REFILL_NS {
            (*looks).refilled = now;
            (*looks).tokens = LOOKS;
        }
        atomic::fetch_add(&raw mut (*looks).tokens, u64::MAX) as i64 > 0
    }
}
