//! From a decision to a verdict: mode, record, repeats, quota. The only place
//! where a denial becomes one.

use crate::record::{self, Task};
use crate::{atomic, identity, kernel, label, policy};
use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use sensor_common::addr::Addr;
use sensor_common::kernel::{Denial, VERDICTS_OF_ENTRIES, verdicts_of};
use sensor_common::label::{Label, ROLE_SERVER};
use sensor_common::name::NAMES_PER_ADDRESS;
use sensor_common::policy::{
    Decision, Flow, Held, MODE_AUDIT, PROFILE_NAMES, PROFILE_SELF, Ranked, Reason, SERVER_HASHED,
    SERVER_UNKNOWN, Tables as _, by_address, rank, stricter,
};
use sensor_common::record::{
    COMM_BYTES, Hook, KIND_VERDICT, Loss, RING_TELEMETRY, RING_VERDICTS, VERDICT_ALLOW, VERDICT_DENY,
    VERDICT_WOULD_DENY, Verdict, VerdictKey,
};
use sensor_common::{UDP, dns};

/// Denials that were recorded once, and how often they came again.
#[map]
static DENIALS: HashMap<VerdictKey, Denial> = HashMap::with_max_entries(16384, 0);

/// Denials of each server, and those that went through in audit; see [`verdicts_of`].
#[map]
static VERDICTS_OF: Array<u64> = Array::with_max_entries(VERDICTS_OF_ENTRIES, 0);
/// What of [`VERDICTS_OF`] the agent has seen; the first entry is when
/// (CLOCK_BOOTTIME). Its own: no program writes it.
#[map]
static VERDICTS_SEEN: Array<u64> = Array::with_max_entries(VERDICTS_OF_ENTRIES, 0);

/// Counts a denial for whoever asks how many there were while no agent ran.
#[inline(always)]
pub(crate) fn count(server: u16, verdict: u8) {
    if let Some(counter) = VERDICTS_OF.get_ptr_mut(verdicts_of(server, verdict)) {
        // SAFETY: an aligned word in a map value.
        atomic::add(counter, 1);
    }
}

/// Records that one instance may add per [`REFILL_NS`]; a burst of as many
/// again fits.
const QUOTA: i64 = 64;
const REFILL_NS: u64 = 250_000_000;
/// Telemetry has more: allowed connections are the map of who talks to whom.
const TELEMETRY_QUOTA: i64 = 1024;

/// What a record says besides the decision.
#[derive(Clone, Copy)]
pub(crate) struct Facts {
    pub label: Label,
    pub task: Task,
    pub key: VerdictKey,
    pub rule: u32,
    pub netns: u64,
    pub cookie: u64,
    pub other_port: u16,
    pub family: u16,
    pub kind: u16,
    pub option: u16,
}

impl Facts {
    #[inline(always)]
    pub(crate) fn of(label: Label, hook: Hook, task: Task) -> Facts {
        Facts {
            label,
            task,
            key: VerdictKey {
                instance: label.instance(),
                server: label.server(),
                port: 0,
                addr: [0; 4],
                protocol: 0,
                reason: 0,
                verdict: 0,
                hook: hook as u8,
            },
            rule: 0,
            netns: 0,
            cookie: 0,
            other_port: 0,
            family: 0,
            kind: 0,
            option: 0,
        }
    }
}

/// A decision under the mode of the label's server.
#[derive(Clone, Copy)]
pub(crate) struct Judged {
    pub decision: Decision,
    pub label: Label,
    pub audit: bool,
    /// The far end is loopback and the profile has `to: [self]`, in this rule;
    /// 0: no. Whether the socket there is the instance's own is for the caller
    /// to find out.
    pub self_rule: u32,
}

impl Judged {
    /// A denial that no rule can lift.
    #[inline(always)]
    pub(crate) fn flat(label: Label, reason: Reason, audit: bool) -> Judged {
        Judged { decision: Decision::because(reason), label, audit, self_rule: 0 }
    }

    #[inline(always)]
    pub(crate) fn denies(&self) -> bool {
        !self.decision.allows() && !self.audit
    }
}

/// What the policy in force says of `label` and `flow` in a network namespace
/// (0: not known, where names do not count).
#[inline(always)]
pub(crate) fn judge(label: Label, flow: &Flow, netns: u64) -> Judged {
    let [a, b, c, d] = flow.addr.0;
    let (high, low) = (a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32);
    let rest = policy::pack(flow, false);
    // SAFETY: plain integers, both ways.
    let packed = unsafe {
        let packed = judge_flow(label.0, high, low, rest, netns);
        if packed & ASK_NAMES == 0 {
            one_path(packed)
        } else {
            one_path(packed & (IN_AUDIT | HASHED) | judge_names(label.0, high, low, rest, netns))
        }
    };
    verified(label, packed, high, low, rest)
}

/// [`judge`] where names do not count: what comes in, and groups.
#[inline(always)]
pub(crate) fn judge_by_address(label: Label, flow: &Flow) -> Judged {
    let [a, b, c, d] = flow.addr.0;
    let (high, low) = (a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32);
    let rest = policy::pack(flow, false);
    // SAFETY: plain integers, both ways.
    let packed = unsafe { judge_flow(label.0, high, low, rest, 0) };
    verified(label, packed, high, low, rest)
}

/// The same under the profile of `unknown` too, if the instance's file is not
/// verified. Names do not open anything there.
#[inline(always)]
fn verified(label: Label, packed: u64, high: u64, low: u64, rest: u64) -> Judged {
    let mut packed = packed;
    if packed & HASHED != 0 && identity::is_unverified_now(label) {
        let unknown = Label::new(SERVER_UNKNOWN, ROLE_SERVER, 0);
        // SAFETY: plain integers, both ways.
        packed = unsafe { both(packed, judge_flow(unknown.0, high, low, rest, 0)) };
    }
    let held = unpack(packed);
    Judged { decision: held.decision, label, audit: held.audit, self_rule: held.self_rule }
}

#[inline(always)]
fn unpack(packed: u64) -> Held {
    // SAFETY: the low byte is a `Reason`, put there by the functions below.
    let reason = unsafe { core::mem::transmute::<u8, Reason>(packed as u8) };
    let rule = (packed >> 32) as u32;
    let ask_self = packed & ASK_SELF != 0;
    Held {
        decision: Decision { reason, rule: if ask_self { 0 } else { rule }, sni: packed & NEEDS_SNI != 0 },
        audit: packed & IN_AUDIT != 0,
        self_rule: if ask_self { rule } else { 0 },
    }
}

/// What comes out of a global function may be anything, to the verifier: the
/// ways that led to `word` are one from here on.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn one_path(mut word: u64) -> u64 {
    // SAFETY: one instruction on a register, so that the compiler does not see
    // that nothing happens.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) word, options(nomem, nostack, pure, preserves_flags)) };
    word
}

/// What [`judge_flow`] said of an instance whose file is not verified, and what
/// it says of a server that nobody declared. No caller of [`judge_flow`], which
/// has what is left of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn both(server: u64, unknown: u64) -> u64 {
    let held = stricter(unpack(server), unpack(unknown));
    let (flag, rule) = if held.self_rule != 0 { (ASK_SELF, held.self_rule) } else { (0, held.decision.rule) };
    let audit = if held.audit { IN_AUDIT } else { 0 };
    let sni = if held.decision.sni { NEEDS_SNI } else { 0 };
    held.decision.reason as u64 | audit | flag | sni | (rule as u64) << 32
}

const IN_AUDIT: u64 = 1 << 8;
/// The rule is that of `to: [self]`, and the denial may be lifted by it.
const ASK_SELF: u64 = 1 << 9;
/// No rule covers the address, but the profile has names.
const ASK_NAMES: u64 = 1 << 10;
/// [`Decision::sni`].
const NEEDS_SNI: u64 = 1 << 11;
/// The server has rules with a hash.
const HASHED: u64 = 1 << 12;

/// [`judge`] by address, as a global function of integers: the verifier looks at
/// it once, not once per caller and path. Returns the reason in bits 0..8,
/// [`IN_AUDIT`], [`ASK_SELF`], [`ASK_NAMES`], [`HASHED`], and the rule in bits
/// 32..64.
///
/// Without a policy entry it says no, in enforce mode: a label nobody knows is
/// not a free pass.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn judge_flow(label: u64, high: u64, low: u64, rest: u64, netns: u64) -> u64 {
    let label = Label(label);
    let addr = Addr([high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]);
    let flow = Flow { addr, ..policy::unpack(rest) };
    if label == label::OVERFLOWED {
        return Reason::LabelOverflow as u64;
    }
    let generation = kernel::generation();
    let Some(server) = policy::server(generation, label.server()) else {
        return Reason::NoPolicy as u64;
    };
    if label::quarantined(label) {
        return Reason::Quarantined as u64;
    }
    let mut flags = if server.mode == MODE_AUDIT { IN_AUDIT } else { 0 };
    if server.flags & SERVER_HASHED != 0 {
        flags |= HASHED;
    }
    let profile_id = policy::profile_of(server, label);
    let tables = policy::Maps { server: label.server(), netns: label::home(label, netns) };
    let decision = by_address(&tables, generation, profile_id, &flow);
    if matches!(decision.reason, Reason::NoRule | Reason::NoInboundRule)
        && let Some(profile) = policy::profile(generation, profile_id)
    {
        if profile.flags & PROFILE_SELF != 0 && addr.normalise().is_loopback() {
            return decision.reason as u64 | flags | ASK_SELF | (profile.self_rule as u64) << 32;
        }
        if matches!(decision.reason, Reason::NoRule) && profile.flags & PROFILE_NAMES != 0 {
            flags |= ASK_NAMES;
        }
    }
    decision.reason as u64 | flags | (decision.rule as u64) << 32
}

/// What the names of an address say of it; as [`judge_flow`].
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn judge_names(label: u64, high: u64, low: u64, rest: u64, netns: u64) -> u64 {
    let addr = Addr([high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]);
    let [a, b, c, d] = addr.normalise().0;
    let (high, low) = (a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32);
    let mut best = Ranked::NONE.0;
    let mut slot = 0;
    while slot < NAMES_PER_ADDRESS as u64 {
        // SAFETY: plain integers, both ways.
        let ranked = unsafe { judge_name(label, high, low, rest | slot << 48, netns) };
        if ranked == NO_NAME {
            break;
        }
        best = if ranked > best { ranked } else { best };
        slot += 1;
    }
    let flow = policy::unpack(rest);
    let decision = Ranked(best).decision(flow.any_port);
    if matches!(decision.reason, Reason::NoRule) && flow.port == dns::PORT && flow.protocol == UDP {
        return Reason::ForeignResolver as u64;
    }
    let sni = if decision.sni { NEEDS_SNI } else { 0 };
    decision.reason as u64 | sni | (decision.rule as u64) << 32
}

/// There is no name in this slot, nor in any after it.
pub(crate) const NO_NAME: u64 = u64::MAX;

/// [`policy::rank`] of the name in one slot (the upper 16 bits of `rest`) of a
/// normalised address; as [`judge_flow`].
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn judge_name(label: u64, high: u64, low: u64, rest: u64, netns: u64) -> u64 {
    let label = Label(label);
    let generation = kernel::generation();
    let Some(server) = policy::server(generation, label.server()) else { return NO_NAME };
    let tables = policy::Maps { server: label.server(), netns: label::home(label, netns) };
    let addr = Addr([high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]);
    match tables.named(generation, policy::profile_of(server, label), &addr, (rest >> 48) as u16) {
        Some(named) => rank(&tables, generation, named, &policy::unpack(rest)).0,
        None => NO_NAME,
    }
}

/// Denied for a reason that no rule can lift, unless in audit. Returns what a
/// cgroup hook returns: 0 refuses, 1 goes on.
#[inline(always)]
pub(crate) fn refuse(facts: &mut Facts, reason: Reason) -> i32 {
    let audit = in_audit(facts.label);
    conclude(facts, &Judged::flat(facts.label, reason, audit))
}

/// The label's server is in audit, and `unknown` as well if the file is not
/// verified; no when nothing is known of it.
#[inline(always)]
pub(crate) fn in_audit(label: Label) -> bool {
    let generation = kernel::generation();
    let Some(server) = policy::server(generation, label.server()) else { return false };
    if label::quarantined(label) {
        return false;
    }
    if server.mode != MODE_AUDIT || !identity::unverified(generation, server, label) {
        return server.mode == MODE_AUDIT;
    }
    match policy::server(generation, SERVER_UNKNOWN) {
        Some(unknown) => unknown.mode == MODE_AUDIT,
        None => false,
    }
}

/// The one place where a decision turns into a verdict and its record.
#[inline(always)]
pub(crate) fn conclude(facts: &mut Facts, judged: &Judged) -> i32 {
    conclude_in::<true>(facts, judged)
}

/// [`conclude`] for packets, which belong to no task: before Linux 6.13 the
/// packet hooks may not even ask for one.
#[inline(always)]
pub(crate) fn conclude_packet(facts: &mut Facts, judged: &Judged) -> i32 {
    conclude_in::<false>(facts, judged)
}

#[inline(always)]
fn conclude_in<const TASK: bool>(facts: &mut Facts, judged: &Judged) -> i32 {
    let verdict = match (judged.decision.allows(), judged.audit) {
        (true, _) => VERDICT_ALLOW,
        (false, true) => VERDICT_WOULD_DENY,
        (false, false) => VERDICT_DENY,
    };
    facts.label = judged.label;
    facts.rule = judged.decision.rule;
    facts.key.server = judged.label.server();
    facts.key.instance = judged.label.instance();
    facts.key.reason = judged.decision.reason as u8;
    facts.key.verdict = verdict;
    record::<TASK>(facts);
    match verdict {
        VERDICT_ALLOW | VERDICT_WOULD_DENY => 1,
        _ => 0,
    }
}

#[inline(never)]
fn record<const TASK: bool>(facts: &Facts) {
    let key = &facts.key;
    if key.verdict == VERDICT_ALLOW {
        if take_token(facts.label, false) {
            emit::<TASK>(RING_TELEMETRY, facts);
        }
        return;
    }
    count(key.server, key.verdict);
    if let Some(seen) = DENIALS.get_ptr_mut(key) {
        // SAFETY: an aligned word in a map value.
        atomic::add(unsafe { &raw mut (*seen).count }, 1);
        return;
    }
    if !take_token(facts.label, true) {
        return;
    }
    if DENIALS.insert(key, Denial { count: 1, sent: 0 }, 0).is_err() {
        record::lost(Loss::DenialsFull, 1);
    }
    if emit::<TASK>(RING_VERDICTS, facts)
        && let Some(seen) = DENIALS.get_ptr_mut(key)
    {
        // SAFETY: as above. A denial that found the ring full stays unsent and
        // is reported from this table.
        atomic::add(unsafe { &raw mut (*seen).sent }, 1);
    }
}

#[inline(always)]
fn emit<const TASK: bool>(ring: u8, facts: &Facts) -> bool {
    record::emit_of::<Verdict>(ring, KIND_VERDICT, facts.label, facts.task, |r| {
        r.key = facts.key;
        r.rule = facts.rule;
        r.netns = facts.netns;
        r.cookie = facts.cookie;
        r.other_port = facts.other_port;
        r.family = facts.family;
        r.kind = facts.kind;
        r.option = facts.option;
        if TASK {
            // SAFETY: 16 bytes are there, and all of them are written.
            unsafe { bpf_get_current_comm(r.comm.as_mut_ptr().cast(), COMM_BYTES as u32) };
        } else {
            r.comm = [0; COMM_BYTES];
        }
    })
}

/// One record of the instance's quota; what goes beyond is counted.
#[inline(always)]
pub(crate) fn take_token(label: Label, verdicts: bool) -> bool {
    let Some(i) = label::instance(label.instance()) else {
        return true; // the table was full, which was counted
    };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: map value; two CPUs that refill at once give at most one refill
    // too many.
    unsafe {
        if now.wrapping_sub((*i).refilled) > REFILL_NS {
            (*i).refilled = now;
            (*i).verdict_tokens = QUOTA;
            (*i).telemetry_tokens = TELEMETRY_QUOTA;
        }
    }
    let (tokens, loss) = if verdicts {
        // SAFETY: an aligned word in a map value.
        (unsafe { &raw mut (*i).verdict_tokens }, Loss::VerdictQuota)
    } else {
        // SAFETY: as above.
        (unsafe { &raw mut (*i).telemetry_tokens }, Loss::TelemetryQuota)
    };
    if (atomic::fetch_add(tokens.cast(), u64::MAX) as i64) > 0 {
        return true;
    }
    record::lost(loss, 1);
    false
}
