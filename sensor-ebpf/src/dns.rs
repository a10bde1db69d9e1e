//! DNS of labelled sockets: a query leaves only for a name that a rule covers,
//! an answer is learned from before the program can read it. The reading itself
//! is `sensor_common::dns`.

use crate::handover::{Note, handed};
use crate::packet;
use crate::record;
use crate::scratch::{self, Scratch};
use crate::{name, policy, traffic};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_sk_storage_get};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use core::ffi::c_void;
use core::ptr;
pub(crate) use sensor_common::dns::PORT;
use sensor_common::dns::{
    A, AAAA, ASKED, ASKED_ONLY, ASKED_TRUSTED, Asked, MESSAGE_BYTES, QUERY_BYTES, Queries, Reader, STEPS,
    Step,
};
use sensor_common::name::NAME_ASK_ONLY;
use sensor_common::policy::Reason;
use sensor_common::record::{Hook, Loss, VERDICT_DENY};
use sensor_common::{TCP, UDP};

const BPF_MAP_TYPE_SK_STORAGE: usize = 24;

#[repr(C)]
pub struct Storage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE],
    key: *const i32,
    value: *const Queries,
    max_entries: *const [i32; 0],
    /// BPF_F_NO_PREALLOC, which the type demands.
    map_flags: *const [i32; 1],
}

// SAFETY: a map definition, patched by the loader and never read from here.
unsafe impl Sync for Storage {}

/// What each socket asked, as long as it lives.
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "QUERIES")]
static QUERIES: Storage = Storage {
    r#type: ptr::null(),
    key: ptr::null(),
    value: ptr::null(),
    max_entries: ptr::null(),
    map_flags: ptr::null(),
};

/// What a socket asked, or null. `sk` is a socket pointer of the verifier's.
#[inline(always)]
fn queries(sk: *mut bpf_sock, create: bool) -> *mut Queries {
    // SAFETY: the verifier checks `sk`.
    unsafe {
        bpf_sk_storage_get((&raw const QUERIES).cast_mut().cast(), sk.cast(), ptr::null_mut(), create as u64)
    }
    .cast()
}

/// What a loop over a message works on; the verifier follows pointers on the
/// stack, not in maps.
struct Work {
    scratch: *mut Scratch,
    queries: *mut Queries,
    number: u32,
}

/// Steps that a query may take.
const QUERY_STEPS: u32 = 2 * QUERY_BYTES;

/// The queries of a packet to port 53. The packet's own verdict is in the note:
/// a query to a resolver that is not pinned is read for its name alone.
#[cgroup_skb(egress)]
pub fn dns_query(ctx: SkBuffContext) -> i32 {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    let verdict = read_query(skb);
    if verdict == 0 {
        traffic::denied(skb, true);
    }
    verdict
}

#[inline(always)]
fn read_query(skb: *mut __sk_buff) -> i32 {
    let note = Note::read(skb);
    let mut packet = packet::EMPTY;
    let Some((sk, stored)) = handed(skb, &mut packet) else { return 0 };
    // SAFETY: fields of the context.
    let (len, data, data_end, gso) =
        unsafe { ((*skb).len, (*skb).data as u64, (*skb).data_end as u64, (*skb).gso_size) };
    let size = len.wrapping_sub(packet.payload);
    if packet.protocol == TCP && (size == 0 || size > len) {
        return 1; // no payload: the handshake, an ACK
    }
    let queries = queries(sk, true);
    if queries.is_null() {
        record::lost(Loss::NameBuffer, 1);
        return note.unread();
    }
    let Some((number, scratch)) = scratch::take() else {
        record::lost(Loss::NameBuffer, 1);
        return note.unread();
    };
    // SAFETY: the buffer is this run's alone; the socket's value outlives it.
    let (work, s) = unsafe { (&mut *scratch, &*stored) };
    name::about(&mut work.about, skb, s, &note, &packet);
    work.about.port = PORT;
    work.about.own_port = packet.source_port;
    // What lies outside the linear part could change after it was read
    // (MSG_ZEROCOPY), what is segmented later holds more than one datagram
    // (UDP_SEGMENT). TCP payload always lies outside.
    let plain = packet.protocol == TCP || (gso == 0 && data_end - data >= len as u64);
    work.dns = Reader::new(size, packet.protocol == TCP, false);
    if plain && size <= QUERY_BYTES && work.bytes.load(skb, packet.payload, size) {
        let mut context = Work { scratch, queries, number };
        // SAFETY: the callback and its context outlive the call.
        unsafe { bpf_loop(QUERY_STEPS, query_step as *mut c_void, (&raw mut context).cast(), 0) };
    } else {
        work.name.data.text = [0; sensor_common::name::NAME_BYTES];
    }
    let verdict = match work.about.done {
        READ => 1,
        DENIED => 0,
        _ => {
            if note.reason == Reason::Resolver as u8 {
                work.about.reason = Reason::QueryUnread as u8;
            }
            (conclude(number, Hook::Egress, 0) != VERDICT_DENY as u32) as i32
        }
    };
    scratch::give(number);
    verdict
}

#[inline(always)]
fn conclude(number: u32, hook: Hook, qtype: u16) -> u32 {
    // SAFETY: plain integers, both ways.
    unsafe { name::conclude_name(number, hook as u32, qtype as u32) }
}

/// `About::done`
const READ: u8 = 1;
const UNREAD: u8 = 2;
const DENIED: u8 = 3;

const MORE: i64 = 0;
const STOP: i64 = 1;

extern "C" fn query_step(_index: u32, work: *mut Work) -> i64 {
    // SAFETY: the loop's own context; the buffer is this run's alone.
    let (scratch, queries, number) = unsafe { (&mut *(*work).scratch, (*work).queries, (*work).number) };
    match scratch.dns.step(&scratch.bytes, &mut scratch.name.data.text) {
        Step::More | Step::Address => MORE,
        Step::Done => {
            scratch.about.done = if scratch.about.questions > 0 { READ } else { UNREAD };
            STOP
        }
        Step::Unread => {
            scratch.about.done = UNREAD;
            STOP
        }
        Step::Question => {
            scratch.about.questions += 1;
            // SAFETY: a map value, as long as the socket lives.
            ask(scratch, number, unsafe { &mut *queries })
        }
    }
}

/// Judges the question that was read, and remembers it for its answer.
#[inline(always)]
fn ask(scratch: &mut Scratch, number: u32, queries: &mut Queries) -> i64 {
    let base = scratch.about.reason;
    let qtype = scratch.dns.qtype;
    let mut flags = 0;
    if base == Reason::Resolver as u8 {
        let rule = name::look_up(&mut scratch.name, scratch.about.scope);
        scratch.about.reason = match rule {
            None => Reason::NameNoRule,
            Some(_) if qtype != A && qtype != AAAA => Reason::QueryType,
            Some(rule) => {
                flags = if rule.flags & NAME_ASK_ONLY != 0 { ASKED_ONLY } else { ASKED_TRUSTED };
                scratch.about.rule = policy::first_rule(scratch.about.generation, rule.port_set);
                Reason::Name
            }
        } as u8;
    }
    let verdict = conclude(number, Hook::Egress, qtype);
    scratch.about.reason = base;
    if verdict == VERDICT_DENY as u32 {
        scratch.about.done = DENIED;
        return STOP;
    }
    let at = scratch::bounded(queries.next, ASKED as u64 - 1) as usize;
    // SAFETY: the index is below the length. Two senders at once on one socket
    // may lose one of two questions: it is then not learned.
    unsafe {
        *queries.asked.as_mut_ptr().add(at) =
            Asked { hash: scratch.dns.hash, resolver: scratch.about.peer, id: scratch.dns.id, qtype, flags };
    }
    queries.next += 1;
    MORE
}

/// Learns from what comes from port 53, if the socket asked. It passes in any
/// case.
#[cgroup_skb(ingress)]
pub fn dns_answer(ctx: SkBuffContext) -> i32 {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    let note = Note::read(skb);
    let mut packet = packet::EMPTY;
    let Some((sk, stored)) = handed(skb, &mut packet) else { return 1 };
    let queries = queries(sk, false);
    if queries.is_null() {
        return 1;
    }
    // SAFETY: a field of the context.
    let len = unsafe { (*skb).len };
    let size = len.wrapping_sub(packet.payload);
    if size == 0 || size > len {
        return 1;
    }
    let Some((number, scratch)) = scratch::take() else {
        record::lost(Loss::NameBuffer, 1);
        return 1;
    };
    // SAFETY: the buffer is this run's alone; the socket's value outlives it.
    let (work, s) = unsafe { (&mut *scratch, &*stored) };
    name::about(&mut work.about, skb, s, &note, &packet);
    work.about.port = packet.source_port;
    work.about.own_port = packet.destination_port;
    let most = MESSAGE_BYTES as u32;
    let size = if size > most { most } else { size };
    work.dns = Reader::new(size, packet.protocol != UDP, true);
    if work.bytes.load(skb, packet.payload, size) {
        let mut context = Work { scratch, queries, number };
        // SAFETY: the callback and its context outlive the call.
        unsafe { bpf_loop(STEPS, answer_step as *mut c_void, (&raw mut context).cast(), 0) };
    }
    if work.about.done != READ {
        work.about.reason = Reason::AnswerUnread as u8;
        work.dns.addr = sensor_common::addr::Addr([0; 4]);
        conclude(number, Hook::Ingress, work.dns.qtype);
    }
    scratch::give(number);
    1
}

extern "C" fn answer_step(_index: u32, work: *mut Work) -> i64 {
    // SAFETY: the loop's own context; the buffer is this run's alone.
    let (scratch, queries, number) = unsafe { (&mut *(*work).scratch, (*work).queries, (*work).number) };
    match scratch.dns.step(&scratch.bytes, &mut scratch.name.data.text) {
        Step::More => MORE,
        Step::Done => {
            scratch.about.done = READ;
            STOP
        }
        Step::Unread => {
            scratch.about.done = UNREAD;
            STOP
        }
        Step::Question => {
            // SAFETY: a map value, as long as the socket lives.
            match asked(scratch, unsafe { &*queries }) {
                Some(flags) => {
                    scratch.about.asked = flags;
                    MORE
                }
                // Nobody asked: nothing of it is believed.
                None => {
                    scratch.about.done = UNREAD;
                    STOP
                }
            }
        }
        Step::Address => {
            if scratch.about.asked & ASKED_ONLY == 0 {
                // SAFETY: plain integers, both ways.
                let outcome = unsafe { name::learn_name(number) };
                if outcome & name::NEW != 0 {
                    // SAFETY: as above.
                    unsafe {
                        if name::enter_name(number) != 0 {
                            name::forget_name(number);
                        }
                    }
                } else if outcome != Reason::Name as u32 {
                    scratch.about.reason = outcome as u8;
                    conclude(number, Hook::Ingress, scratch.dns.qtype);
                }
            }
            MORE
        }
    }
}

/// Flags of the query that this answers.
#[inline(always)]
fn asked(scratch: &Scratch, queries: &Queries) -> Option<u32> {
    const FOUND: u32 = 1 << 31;
    let (dns, peer) = (&scratch.dns, &scratch.about.peer);
    let mut found = 0;
    let mut i = 0;
    while i < ASKED as usize {
        // SAFETY: below the length.
        let a = unsafe { &*queries.asked.as_ptr().add(i) };
        let other = (a.hash ^ dns.hash)
            | (a.id ^ dns.id) as u64
            | (a.qtype ^ dns.qtype) as u64
            | (a.resolver.0[0] ^ peer.0[0]) as u64
            | (a.resolver.0[1] ^ peer.0[1]) as u64
            | (a.resolver.0[2] ^ peer.0[2]) as u64
            | (a.resolver.0[3] ^ peer.0[3]) as u64;
        found = if other == 0 { a.flags | FOUND } else { found };
        i += 1;
    }
    if found & FOUND != 0 { Some(found & !FOUND) } else { None }
}
