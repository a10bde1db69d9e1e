//! From a decision to a verdict: mode, record, repeats, quota. The only place
//! where a denial becomes one.

use crate::record::{self, Task};
use crate::{atomic, kernel, label, policy};
use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use sensor_common::kernel::Denial;
use sensor_common::label::Label;
use sensor_common::policy::{Decision, Flow, MODE_AUDIT, Reason, decide};
use sensor_common::record::{
    COMM_BYTES, Hook, KIND_VERDICT, Loss, RING_TELEMETRY, RING_VERDICTS, VERDICT_ALLOW, VERDICT_DENY,
    VERDICT_WOULD_DENY, Verdict, VerdictKey,
};

/// Denials that were recorded once, and how often they came again.
#[map]
static DENIALS: HashMap<VerdictKey, Denial> = HashMap::with_max_entries(16384, 0);

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
}

impl Judged {
    #[inline(always)]
    pub(crate) fn denies(&self) -> bool {
        !self.decision.allows() && !self.audit
    }
}

/// What the policy in force says of `label` and `flow`. Without a policy entry
/// it says no, in enforce mode: a label nobody knows is not a free pass.
#[inline(always)]
pub(crate) fn judge(label: Label, flow: &Flow) -> Judged {
    let generation = kernel::generation();
    if label == label::OVERFLOWED {
        return Judged { decision: Decision::because(Reason::LabelOverflow), label, audit: false };
    }
    let Some(server) = policy::server(generation, label.server()) else {
        return Judged { decision: Decision::because(Reason::NoPolicy), label, audit: false };
    };
    let decision = decide(&policy::Maps, generation, policy::profile_of(server, label), flow);
    Judged { decision, label, audit: server.mode == MODE_AUDIT }
}

/// Denied for a reason that no rule can lift, unless in audit. Returns what a
/// cgroup hook returns: 0 refuses, 1 goes on.
#[inline(always)]
pub(crate) fn refuse(facts: &Facts, reason: Reason) -> i32 {
    let audit = match policy::server(kernel::generation(), facts.label.server()) {
        Some(server) => server.mode == MODE_AUDIT,
        None => false,
    };
    conclude(facts, &Judged { decision: Decision::because(reason), label: facts.label, audit })
}

/// The one place where a decision turns into a verdict and its record.
#[inline(always)]
pub(crate) fn conclude(facts: &Facts, judged: &Judged) -> i32 {
    let verdict = match (judged.decision.allows(), judged.audit) {
        (true, _) => VERDICT_ALLOW,
        (false, true) => VERDICT_WOULD_DENY,
        (false, false) => VERDICT_DENY,
    };
    record(facts, judged, verdict);
    match verdict {
        VERDICT_ALLOW | VERDICT_WOULD_DENY => 1,
        _ => 0,
    }
}

#[inline(never)]
fn record(facts: &Facts, judged: &Judged, verdict: u8) {
    let mut key = facts.key;
    key.server = judged.label.server();
    key.instance = judged.label.instance();
    key.reason = judged.decision.reason as u8;
    key.verdict = verdict;
    if verdict == VERDICT_ALLOW {
        if take_token(judged.label, false) {
            emit(RING_TELEMETRY, facts, judged, &key);
        }
        return;
    }
    if let Some(seen) = DENIALS.get_ptr_mut(key) {
        // SAFETY: an aligned word in a map value.
        atomic::fetch_add(unsafe { &raw mut (*seen).count }, 1);
        return;
    }
    if !take_token(judged.label, true) {
        return;
    }
    if DENIALS.insert(key, Denial { count: 1, sent: 0 }, 0).is_err() {
        record::lost(Loss::DenialsFull, 1);
    }
    if emit(RING_VERDICTS, facts, judged, &key)
        && let Some(seen) = DENIALS.get_ptr_mut(key)
    {
        // SAFETY: as above. A denial that found the ring full stays unsent and
        // is reported from this table.
        atomic::fetch_add(unsafe { &raw mut (*seen).sent }, 1);
    }
}

#[inline(always)]
fn emit(ring: u8, facts: &Facts, judged: &Judged, key: &VerdictKey) -> bool {
    record::emit_of::<Verdict>(ring, KIND_VERDICT, judged.label, facts.task, |r| {
        r.key = *key;
        r.rule = judged.decision.rule;
        r.netns = facts.netns;
        r.cookie = facts.cookie;
        r.other_port = facts.other_port;
        r.family = facts.family;
        r.kind = facts.kind;
        r.option = facts.option;
        r.comm = [0; COMM_BYTES];
        if facts.task.tid != 0 {
            // SAFETY: 16 bytes are there.
            unsafe { bpf_get_current_comm(r.comm.as_mut_ptr().cast(), COMM_BYTES as u32) };
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
    if verdicts {
        // SAFETY: an aligned word in a map value.
        atomic::fetch_add(unsafe { &raw mut (*i).suppressed }, 1);
    }
    false
}
