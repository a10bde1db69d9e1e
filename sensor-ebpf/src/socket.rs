//! Labels of sockets: taken at creation, kept over accept, carried by the
//! socket wherever its descriptor goes.

use crate::record::{self, Task};
use crate::verdict::{self, Facts};
use crate::{kernel, label, policy};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::{cgroup_sock, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::SockContext;
use core::ffi::c_void;
use core::ptr;
use sensor_common::label::Label;
use sensor_common::policy::Reason;
use sensor_common::record::{Hook, Loss};
use sensor_common::socket::{SOCKET_ADOPTED, Socket, Tuple};
use sensor_common::{TCP, UDP};

const BPF_MAP_TYPE_SK_STORAGE: usize = 24;
/// BPF_F_NO_PREALLOC, which the type demands, and BPF_F_CLONE: accepted
/// sockets start with a copy of the listener's.
const FLAGS: usize = 1 | 1 << 9;

/// aya's own definition has no place for BPF_F_CLONE, nor for the socket pointers
/// of packet and socket hooks.
#[repr(C)]
pub struct Storage<T, const FLAGS: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

impl<T, const FLAGS: usize> Storage<T, FLAGS> {
    pub(crate) const fn new() -> Self {
        Storage {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// What a socket carries, or null. `sk` is a socket pointer of the verifier's.
    #[inline(always)]
    pub(crate) fn get(&'static self, sk: *mut bpf_sock) -> *mut T {
        self.get_or(sk, ptr::null_mut(), 0)
    }

    /// The same; made of zeros where there was none, null if there is no memory.
    #[inline(always)]
    pub(crate) fn get_or_zeroed(&'static self, sk: *mut bpf_sock) -> *mut T {
        self.get_or(sk, ptr::null_mut(), CREATE)
    }

    #[inline(always)]
    fn get_or(&'static self, sk: *mut bpf_sock, value: *mut T, flags: u64) -> *mut T {
        // SAFETY: the verifier checks `sk`; the kernel copies the value.
        unsafe {
            bpf_sk_storage_get((&raw const *self).cast_mut().cast(), sk.cast(), value.cast(), flags).cast()
        }
    }
}

const CREATE: u64 = 1;

// SAFETY: a map definition, patched by the loader and never read from here.
unsafe impl<T, const FLAGS: usize> Sync for Storage<T, FLAGS> {}

#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "SOCKETS")]
static SOCKETS: Storage<Socket, FLAGS> = Storage::new();

/// Sockets that a task held when it was labelled by an exec, by socket cookie;
/// the first packet or call that shows one moves its label into the socket.
#[map]
static INHERITED: HashMap<u64, Label> = HashMap::with_max_entries(65536, 0);

/// What a socket carries, or null. `sk` is a socket pointer of the verifier's.
#[inline(always)]
pub(crate) fn storage(sk: *mut bpf_sock) -> *mut Socket {
    SOCKETS.get(sk)
}

/// Gives the socket a label; null if the kernel had no memory for it.
#[inline(always)]
pub(crate) fn attach(sk: *mut bpf_sock, value: &mut Socket) -> *mut Socket {
    let stored = SOCKETS.get_or(sk, value, CREATE);
    if stored.is_null() {
        record::lost(Loss::SocketLabel, 1);
    }
    stored
}

/// A label for a socket that existed before its task was labelled.
#[inline(always)]
pub(crate) fn adopt(sk: *mut bpf_sock, label: Label, netns: u64, task: Task) -> *mut Socket {
    let mut value = new(label, netns, task);
    value.flags = SOCKET_ADOPTED;
    attach(sk, &mut value)
}

#[inline(always)]
fn new(label: Label, netns: u64, task: Task) -> Socket {
    let mut value = empty();
    value.label = label;
    value.netns = netns;
    value.tgid = task.tgid;
    value.uid = task.uid;
    value
}

#[inline(always)]
const fn empty() -> Socket {
    // SAFETY: every field is an integer.
    unsafe { core::mem::MaybeUninit::<Socket>::zeroed().assume_init() }
}

/// The label of an inherited socket that shows itself for the first time.
#[inline(always)]
pub(crate) fn inherited(ctx: *mut c_void) -> Option<Label> {
    // Also gives an accepted socket, which no hook sees created, its cookie.
    // SAFETY: `ctx` is the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx) };
    let counts = kernel::counts()?;
    // SAFETY: an aligned word in a map value.
    if unsafe { (*counts).inherited } == 0 {
        return None;
    }
    // SAFETY: the value is one word.
    let label = unsafe { INHERITED.get(cookie) }.copied()?;
    let _ = INHERITED.remove(cookie);
    Some(label)
}

/// Connections in the accept queues of listeners that were labelled after they
/// came; the agent writes them and takes them out again.
#[map]
static QUEUED: HashMap<Tuple, Label> = HashMap::with_max_entries(16384, 0);

#[inline(always)]
pub(crate) fn queued(ends: &Tuple) -> Option<Label> {
    // SAFETY: the value is one word.
    let label = unsafe { QUEUED.get(ends) }.copied()?;
    let _ = QUEUED.remove(ends);
    Some(label)
}

/// Notes a socket to be labelled when it shows itself.
#[inline(always)]
pub(crate) fn note_inherited(cookie: u64, label: Label) {
    if INHERITED.insert(cookie, label, 0).is_err() {
        record::lost(Loss::InheritedFull, 1);
        return;
    }
    if let Some(counts) = kernel::counts() {
        // SAFETY: a flag; every writer writes the same.
        unsafe { (*counts).inherited = 1 };
    }
}

const STREAM: u32 = 1;
const DGRAM: u32 = 2;

/// cgroup/sock_create runs for AF_INET and AF_INET6 sockets that a task asks
/// for, after the protocol is resolved (net/ipv4/af_inet.c, `inet_create`).
#[cgroup_sock(sock_create)]
pub fn socket(ctx: SockContext) -> i32 {
    let label = label::of_current();
    if !label.is_some() {
        // Gives the socket its cookie, by which an heir of it can be told.
        // SAFETY: `ctx` is the program's context.
        unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        return 1;
    }
    create(ctx.sock, label)
}

#[inline(always)]
fn create(sock: *mut bpf_sock, label: Label) -> i32 {
    // SAFETY: fields of the context.
    let (family, kind, protocol) = unsafe { ((*sock).family, (*sock).type_, (*sock).protocol) };
    let plain = (kind == STREAM && protocol == TCP as u32) || (kind == DGRAM && protocol == UDP as u32);
    // SAFETY: `sock` is the program's context.
    let netns = unsafe { bpf_get_netns_cookie(sock.cast()) };
    let task = Task::current();
    let mut facts = Facts::of(label, Hook::Socket, task);
    facts.key.protocol = protocol as u8;
    facts.family = family as u16;
    facts.kind = kind as u16;
    facts.netns = netns;
    if label == label::OVERFLOWED {
        return verdict::refuse(&mut facts, Reason::LabelOverflow);
    }
    if !plain && !policy::unrestricted(label) {
        // In audit it is made all the same, and labelled.
        if verdict::refuse(&mut facts, Reason::SocketType) == 0 {
            return 0;
        }
    }
    let mut value = new(label, netns, task);
    if attach(sock, &mut value).is_null() {
        return verdict::refuse(&mut facts, Reason::SocketLabel);
    }
    1
}
