//! Names that servers learned, and what they open. Learning is `dns.rs`,
//! holding TLS to it `tls.rs`.

use crate::{record, scratch};
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, lpm_trie::Key};
use sensor_common::name::{
    Learned, LearnedKey, MAX_LEARNED, MAX_NAMES, NAME_ASK_ONLY, NAME_BYTES, NAME_SCOPE_BITS, NO_SET,
    NameRule, NameText, OrderKey, scope,
};
use sensor_common::policy::{MAX_SERVERS, Named};
use sensor_common::record::Loss;

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
static LEARNED_ORDER: HashMap<OrderKey, LearnedKey> = HashMap::with_max_entries(MAX_LEARNED, NO_PREALLOC);
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
    let (of, set, expires) = unsafe { ((*learned).scope, (*learned).set, (*learned).expires) };
    let set = if of == wanted { set } else { set_of(learned, wanted) };
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
        let set = look_up(name, wanted).map_or(NO_SET, |rule| rule.port_set);
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

/// The rule for the name in `key`, NUL-padded. An entry for the search list
/// counts as none.
#[inline(always)]
pub(crate) fn look_up(key: &mut Key<NameBits>, scope: u32) -> Option<NameRule> {
    key.prefix_len = NAME_SCOPE_BITS + 8 * NAME_BYTES as u32;
    key.data.scope = scope;
    let rule = *NAMES.get(&*key)?;
    if rule.flags & NAME_ASK_ONLY != 0 { None } else { Some(rule) }
}
