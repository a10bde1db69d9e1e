//! A wall clock that a test steps: preloaded, it adds the seconds in the file
//! that MCP_TEST_CLOCK names to what CLOCK_REALTIME says. The other clocks are
//! the kernel's.

use libc::{CLOCK_REALTIME, SYS_clock_gettime, c_int, clockid_t, timespec};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

static OFFSET: AtomicPtr<AtomicI64> = AtomicPtr::new(ptr::null_mut());
/// Where there is no file.
static NONE: AtomicI64 = AtomicI64::new(0);

/// Without anything that might ask for the time itself.
fn open() -> *mut AtomicI64 {
    let none = (&raw const NONE).cast_mut();
    // SAFETY: plain calls; the name is a C string, the mapping is a page of a
    // file that is as long as a word at least and stays for good.
    unsafe {
        let name = libc::getenv(c"MCP_TEST_CLOCK".as_ptr());
        if name.is_null() {
            return none;
        }
        let file = libc::open(name, libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return none;
        }
        let page = libc::mmap(ptr::null_mut(), size_of::<i64>(), libc::PROT_READ, libc::MAP_SHARED, file, 0);
        libc::close(file);
        if page == libc::MAP_FAILED { none } else { page.cast() }
    }
}

/// # Safety
///
/// As clock_gettime(2): `time` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    // SAFETY: the caller's pointer, as the caller vouches for it.
    let done = unsafe { libc::syscall(SYS_clock_gettime, clock, time) } as c_int;
    if done == 0 && clock == CLOCK_REALTIME {
        let mut offset = OFFSET.load(Ordering::Relaxed);
        if offset.is_null() {
            offset = open();
            OFFSET.store(offset, Ordering::Relaxed);
        }
        // SAFETY: a word of the mapping or of this library, and the timespec
        // that the kernel has just written.
        unsafe { (*time).tv_sec += (*offset).load(Ordering::Relaxed) };
    }
    done
}
