//! Names that servers learned, and what they open. Learning is `dns.rs`,
//! holding TLS to it `tls.rs`.

use crate::handover::Note;
use crate::packet::Packet;
use crate::record::Task;
use crate::scratch::{About, Scratch};
use crate::verdict::{NO_NAME, count, judge_name, take_token};
use crate::{atomic, kernel, label, policy, record, scratch};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, lpm_trie::Key};
use sensor_common::dns::ASKED_TRUSTED;
use sensor_common::name::{
    LEARNED_PER_SERVER, LEARNED_TRUSTED, Learned, LearnedKey, MAX_LEARNED, MAX_NAMES, NAME_ASK_ONLY,
    NAME_BYTES, NAME_SCOPE_BITS, NAMES_PER_ADDRESS, NO_SET, NameRule, NameText, Order, OrderKey, TTL_CEILING,
    TTL_FLOOR, TTL_GRACE, scope,
};
use sensor_common::policy::{CidrKey, EGRESS, Flow, MAX_SERVERS, Named, Ranked, Reason, Tables as _};
use sensor_common::record::{
    KIND_NAME, Loss, NameVerdict, RING_TELEMETRY, RING_VERDICTS, VERDICT_ALLOW, VERDICT_DENY,
    VERDICT_WOULD_DENY,
};
use sensor_common::socket::Socket;

const NO_PREALLOC: u32 = 1;

/// A `NameKey` without its prefix length.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NameBits {
    pub scope: u32,
    pub text: NameText,
}

#[map]
static NAMES: LpmTrie<NameBits, NameRule> = LpmTrie::with_max_entries(2 * MAX_NAMES, 0);
#[map]
static LEARNED: HashMap<LearnedKey, Learned> = HashMap::with_max_entries(MAX_LEARNED, NO_PREALLOC);
/// What a server learned, oldest first, as a ring.
#[map]
static LEARNED_ORDER: HashMap<OrderKey, Order> = HashMap::with_max_entries(MAX_LEARNED, NO_PREALLOC);
/// How many addresses a server has learned since it was declared.
#[map]
static LEARNED_COUNT: Array<u64> = Array::with_max_entries(MAX_SERVERS, 0);

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// What a learned name opens under a profile.
#[inline(always)]
pub(crate) fn named(key: &LearnedKey, generation: u32, profile: u16) -> Option<Named> {
    let learned = LEARNED.get_ptr_mut(key)?;
    let wanted = scope(generation, profile);
    // SAFETY: map value.
    let (of, set, expires, flags) =
        unsafe { ((*learned).scope, (*learned).set, (*learned).expires, (*learned).flags) };
    let set = if flags & LEARNED_TRUSTED == 0 {
        NO_SET
    } else if of == wanted {
        set
    } else {
        set_of(learned, wanted)
    };
    Some(Named { set, expired: now() > expires })
}

/// The port set of a name under a policy that it was not looked up under yet.
#[inline(never)]
fn set_of(learned: *mut Learned, wanted: u32) -> u32 {
    let Some((number, scratch)) = scratch::take() else {
        record::lost(Loss::NameBuffer, 1);
        return NO_SET;
    };
    // SAFETY: the buffer is this run's alone; `learned` is a map value.
    let set = unsafe {
        let name = &mut (*scratch).name;
        name.data.text = (*learned).text;
        let set = match look_up(name, wanted) {
            Some(rule) if rule.flags & NAME_ASK_ONLY == 0 => rule.port_set,
            _ => NO_SET,
        };
        // Readers that meet a half of this look it up themselves: scope 0 is
        // nobody's.
        (&raw mut (*learned).scope).write_volatile(0);
        (&raw mut (*learned).set).write_volatile(set);
        (&raw mut (*learned).scope).write_volatile(wanted);
        set
    };
    scratch::give(number);
    set
}

/// The rule for the name in `key`, NUL-padded.
#[inline(always)]
pub(crate) fn look_up(key: &mut Key<NameBits>, scope: u32) -> Option<NameRule> {
    key.prefix_len = NAME_SCOPE_BITS + 8 * NAME_BYTES as u32;
    key.data.scope = scope;
    NAMES.get(&*key).copied()
}

/// Notes in a buffer what the names of a packet are judged by.
#[inline(always)]
pub(crate) fn about(about: &mut About, skb: *mut __sk_buff, s: &Socket, note: &Note, packet: &Packet) {
    about.label = s.label;
    about.netns = label::home(s.label, s.netns);
    // SAFETY: `skb` is the program's context.
    about.cookie = unsafe { bpf_get_socket_cookie(skb.cast()) };
    about.now = now();
    about.task = Task { tgid: s.tgid, tid: 0, uid: s.uid };
    about.generation = kernel::generation();
    about.scope = match policy::server(about.generation, s.label.server()) {
        Some(server) => scope(about.generation, policy::profile_of(server, s.label)),
        None => 0,
    };
    about.peer = note.peer;
    about.protocol = packet.protocol;
    about.rule = 0;
    about.reason = note.reason;
    about.audit = note.audit as u8;
    about.done = 0;
    about.asked = 0;
    about.questions = 0;
}

/// Says what became of the name in a buffer, about its `reason`. Returns the
/// verdict. A global function of integers, as those below: the verifier looks at
/// each once, not once per path that leads there.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn conclude_name(number: u32, hook: u32, qtype: u32) -> u32 {
    let Some(scratch) = scratch::at(number) else { return VERDICT_DENY as u32 };
    // SAFETY: the caller's buffer.
    let scratch = unsafe { &*scratch };
    let about = &scratch.about;
    let allows = about.reason < Reason::ProfileNone as u8;
    let verdict = if allows {
        VERDICT_ALLOW
    } else if about.audit != 0 {
        VERDICT_WOULD_DENY
    } else {
        VERDICT_DENY
    };
    let ring = if allows { RING_TELEMETRY } else { RING_VERDICTS };
    if !allows {
        count(about.label.server(), verdict);
    }
    if take_token(about.label, !allows) {
        record::emit_of::<NameVerdict>(ring, KIND_NAME, about.label, about.task, |r| {
            r.key.instance = about.label.instance();
            r.key.server = about.label.server();
            r.key.port = about.port;
            r.key.addr = about.peer.0;
            r.key.protocol = about.protocol;
            r.key.reason = about.reason;
            r.key.verdict = verdict;
            r.key.hook = hook as u8;
            r.rule = about.rule;
            r.netns = about.netns;
            r.cookie = about.cookie;
            r.answer = scratch.dns.addr;
            r.qtype = qtype as u16;
            r.other_port = about.own_port;
            r.text = scratch.name.data.text;
        });
    }
    verdict as u32
}

/// Learns that the name in a buffer is at its `dns.addr`. Returns a [`Reason`]
/// (`Name`: learned), and [`NEW`].
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn learn_name(number: u32) -> u32 {
    match scratch::at(number) {
        Some(scratch) => {
            // SAFETY: the caller's buffer.
            let (reason, new) = learn(unsafe { &mut *scratch });
            reason as u32 | if new { NEW } else { 0 }
        }
        None => Reason::NotLearned as u32,
    }
}

/// The server did not have the address by that name before: its key, which is
/// in the buffer, is to be entered by [`enter_name`].
pub(crate) const NEW: u32 = 1 << 8;

#[inline(always)]
fn learn(scratch: &mut Scratch) -> (Reason, bool) {
    let trusted = scratch.about.asked & ASKED_TRUSTED != 0;
    let addr = scratch.dns.addr.normalise();
    let about = &scratch.about;
    let server = about.label.server();
    if trusted && (addr.is_local() || addr.is_multicast() || addr.is_broadcast()) {
        let profile = u32::from_be(about.scope) as u16;
        let tables = policy::Maps { server, netns: about.netns };
        if tables.set(&CidrKey::new(about.generation, profile, EGRESS, addr, 128)).is_none() {
            return (Reason::Rebinding, false);
        }
    }
    let ttl = scratch.dns.ttl;
    let seconds = ttl.clamp(TTL_FLOOR, TTL_CEILING);
    let new = &mut scratch.learned;
    new.expires = about.now + (seconds + TTL_GRACE) as u64 * 1_000_000_000;
    new.learned = about.now;
    new.hash = scratch.dns.hash;
    new.resolver = about.peer;
    new.scope = 0;
    new.set = NO_SET;
    new.text = scratch.name.data.text;
    new.ttl = ttl;
    new.flags = if trusted { LEARNED_TRUSTED } else { 0 };
    let key = &mut scratch.key;
    *key = LearnedKey { netns: about.netns, addr: addr.0, server, slot: 0, _pad: 0 };
    // The slot that has the name, else the first that is free, else the one that
    // ends first.
    let (mut slot, mut least, mut free) = (0, u64::MAX, false);
    let mut i = 0;
    while i < NAMES_PER_ADDRESS as u16 {
        key.slot = i;
        let Some(known) = LEARNED.get_ptr_mut(&*key) else {
            (slot, free) = (i, true);
            break;
        };
        // SAFETY: map value; a torn read makes two entries of one name.
        let known = unsafe { &*known };
        if known.hash == new.hash {
            slot = i;
            // What a pinned resolver said is not taken back by another.
            if !trusted && known.flags & LEARNED_TRUSTED != 0 {
                return (Reason::Name, false);
            }
            break;
        }
        if known.expires < least {
            (slot, least) = (i, known.expires);
        }
        i += 1;
    }
    key.slot = slot;
    if LEARNED.insert(&*key, &*new, 0).is_err() {
        record::lost(Loss::LearnedFull, 1);
        return (Reason::NotLearned, false);
    }
    (Reason::Name, free)
}

#[inline(always)]
fn same(a: &NameText, b: &NameText) -> bool {
    const WORDS: usize = NAME_BYTES / 4;
    let (a, b): (*const u32, *const u32) = (a.as_ptr().cast(), b.as_ptr().cast());
    let (mut i, mut difference) = (0, 0);
    // Without leaving early: one path for the verifier.
    while i < WORDS {
        // SAFETY: within both texts, which lie in map values at multiples of 4.
        difference |= unsafe { a.add(i).read() ^ b.add(i).read() };
        i += 1;
    }
    difference == 0
}

/// Enters a new key in its server's ring. What stands there goes, unless it was
/// learned again since it was entered: then it is entered anew, and the next
/// goes. Returns 1 if one goes: its key is then in the buffer, for [`forget_name`].
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn enter_name(number: u32) -> u32 {
    const CHANCES: u32 = 4;
    let Some(scratch) = scratch::at(number) else { return 0 };
    // SAFETY: the caller's buffer.
    let scratch = unsafe { &mut *scratch };
    let mut entry = Order { key: scratch.key, stamp: scratch.learned.learned };
    let Some(count) = LEARNED_COUNT.get_ptr_mut(entry.key.server as u32) else { return 0 };
    let mut chances = 0;
    while chances < CHANCES {
        let index = atomic::fetch_add(count, 1) as u32 % LEARNED_PER_SERVER;
        let at = OrderKey { server: entry.key.server as u32, index };
        let Some(oldest) = LEARNED_ORDER.get_ptr_mut(at) else {
            let _ = LEARNED_ORDER.insert(at, entry, 0);
            return 0;
        };
        // SAFETY: map value.
        let previous = unsafe { core::ptr::replace(oldest, entry) };
        let Some(learned) = LEARNED.get_ptr_mut(previous.key) else { return 0 };
        // SAFETY: map value.
        let again = unsafe { (*learned).learned };
        chances += 1;
        if again == previous.stamp || chances == CHANCES {
            scratch.key = previous.key;
            return 1;
        }
        entry = Order { key: previous.key, stamp: again };
    }
    0
}

/// Removes the name whose key is in a buffer; the last one of the address takes
/// its slot, so that there is no gap. Returns 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn forget_name(number: u32) -> u32 {
    let Some(scratch) = scratch::at(number) else { return 0 };
    // SAFETY: the caller's buffer.
    let key = unsafe { &mut (*scratch).key };
    let gone = key.slot & (NAMES_PER_ADDRESS as u16 - 1);
    let mut last = core::ptr::null_mut();
    let mut i = 0;
    while i < NAMES_PER_ADDRESS as u16 {
        key.slot = i;
        let Some(learned) = LEARNED.get_ptr_mut(&*key) else { break };
        last = learned;
        i += 1;
    }
    if i == 0 {
        return 0;
    }
    if gone + 1 < i && !last.is_null() {
        key.slot = gone;
        // SAFETY: map value; the kernel copies it.
        let _ = LEARNED.insert(&*key, unsafe { &*last }, 0);
    }
    key.slot = i - 1;
    if gone <= key.slot {
        let _ = LEARNED.remove(&*key);
    }
    0
}

/// The slot in which a buffer's name is one of its peer's. [`NO_NAME`]: the peer
/// was not learned by it.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn slot_of_name(number: u32) -> u64 {
    let Some(scratch) = scratch::at(number) else { return NO_NAME };
    // SAFETY: the caller's buffer.
    let scratch = unsafe { &mut *scratch };
    let about = &scratch.about;
    let addr = about.peer.normalise().0;
    let key = &mut scratch.key;
    *key = LearnedKey { netns: about.netns, addr, server: about.label.server(), slot: 0, _pad: 0 };
    let mut slot = 0;
    while slot < NAMES_PER_ADDRESS as u64 {
        key.slot = slot as u16;
        let Some(known) = LEARNED.get_ptr_mut(&*key) else { break };
        // SAFETY: map value.
        if same(unsafe { &(*known).text }, &scratch.name.data.text) {
            return slot;
        }
        slot += 1;
    }
    NO_NAME
}

/// The name in a buffer is one that the peer's address was learned by, and a
/// rule for it covers the port.
#[inline(always)]
pub(crate) fn leads_to_peer(scratch: &Scratch, number: u32) -> bool {
    // SAFETY: plain integers, both ways.
    let slot = unsafe { slot_of_name(number) };
    if slot == NO_NAME {
        return false;
    }
    let about = &scratch.about;
    let addr = about.peer;
    let [a, b, c, d] = addr.normalise().0;
    let (high, low) = (a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32);
    let flow = Flow { direction: EGRESS, protocol: about.protocol, port: about.port, addr, any_port: false };
    let rest = policy::pack(&flow, false) | slot << 48;
    // SAFETY: plain integers, both ways.
    let ranked = unsafe { judge_name(about.label.0, high, low, rest, about.netns) };
    ranked != NO_NAME && ranked != Ranked::NONE.0
}
