//! Read-modify-write on words in map values. `core::sync::atomic` leaves these
//! out for this target, which has them since Linux 5.12 (BPF_FETCH).

use core::intrinsics::{AtomicOrdering, atomic_and, atomic_or, atomic_xadd};

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// A relaxed read-modify-write compiles to an instruction that returns nothing,
/// whether or not the result is used.
const FETCHES: AtomicOrdering = AtomicOrdering::SeqCst;

/// Adds (wrapping, so that `-1 as u64` subtracts) and returns what was there.
#[inline(always)]
pub(crate) fn fetch_add(word: *mut u64, n: u64) -> u64 {
    // SAFETY: callers pass an aligned word in a map value.
    unsafe { atomic_xadd::<u64, u64, FETCHES>(word, n) }
}

#[inline(always)]
pub(crate) fn add(word: *mut u64, n: u64) {
    // SAFETY: as above.
    unsafe { atomic_xadd::<u64, u64, RELAXED>(word, n) };
}

/// Sets bits and returns what was there.
#[inline(always)]
pub(crate) fn fetch_or(word: *mut u64, bits: u64) -> u64 {
    // SAFETY: as above.
    unsafe { atomic_or::<u64, u64, FETCHES>(word, bits) }
}

#[inline(always)]
pub(crate) fn or(word: *mut u64, bits: u64) {
    // SAFETY: as above.
    unsafe { atomic_or::<u64, u64, RELAXED>(word, bits) };
}

#[inline(always)]
pub(crate) fn and(word: *mut u64, bits: u64) {
    // SAFETY: as above.
    unsafe { atomic_and::<u64, u64, RELAXED>(word, bits) };
}
