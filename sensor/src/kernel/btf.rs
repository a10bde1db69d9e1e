//! Offsets of kernel structures, from the kernel's own type information.

use btf_rs::{Btf, Type};
use sensor_common::kernel::Offsets;
use std::path::Path;

pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Why the kernel's layout could not be learned.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("cannot read {VMLINUX}: {0} (the kernel needs CONFIG_DEBUG_INFO_BTF)")]
    Read(String),
    #[error("this kernel's `{structure}` has no `{field}`; mcp-sensor does not know its layout")]
    Missing { structure: &'static str, field: &'static str },
}

/// Reads every offset that the programs use.
pub fn offsets() -> Result<Offsets, BtfError> {
    offsets_of(Path::new(VMLINUX))
}

fn offsets_of(path: &Path) -> Result<Offsets, BtfError> {
    let btf = Btf::from_file(path).map_err(|e| BtfError::Read(e.to_string()))?;
    let at = |structure: &'static str, fields: &[&'static str]| -> Result<u32, BtfError> {
        fields
            .iter()
            .find_map(|field| member(&btf, structure, field))
            .ok_or(BtfError::Missing { structure, field: fields[0] })
    };
    let qstr_name = at("qstr", &["name"])?;
    // Two fields since Linux 6.11; before, one structure, renamed in 6.6.
    let ctime = match (member(&btf, "inode", "i_ctime_sec"), member(&btf, "inode", "i_ctime_nsec")) {
        (Some(sec), Some(nsec)) => (sec, nsec),
        _ => {
            let start = at("inode", &["i_ctime", "__i_ctime"])?;
            (start + at("timespec64", &["tv_sec"])?, start + at("timespec64", &["tv_nsec"])?)
        }
    };
    Ok(Offsets {
        task_tgid: at("task_struct", &["tgid"])?,
        task_signal: at("task_struct", &["signal"])?,
        task_real_parent: at("task_struct", &["real_parent"])?,
        task_mm: at("task_struct", &["mm"])?,
        task_nsproxy: at("task_struct", &["nsproxy"])?,
        task_cred: at("task_struct", &["cred"])?,
        task_files: at("task_struct", &["files"])?,
        task_cgroups: at("task_struct", &["cgroups"])?,
        task_exit_code: at("task_struct", &["exit_code"])?,
        signal_live: at("signal_struct", &["live"])?,
        mm_arg_start: at("mm_struct", &["arg_start"])?,
        mm_arg_end: at("mm_struct", &["arg_end"])?,
        mm_exe_file: at("mm_struct", &["exe_file"])?,
        file_path: at("file", &["f_path"])?,
        file_inode: at("file", &["f_inode"])?,
        file_private_data: at("file", &["private_data"])?,
        path_mnt: at("path", &["mnt"])?,
        path_dentry: at("path", &["dentry"])?,
        dentry_name: at("dentry", &["d_name"])? + qstr_name,
        dentry_parent: at("dentry", &["d_parent"])?,
        dentry_inode: at("dentry", &["d_inode"])?,
        mount_mnt: at("mount", &["mnt"])?,
        mount_parent: at("mount", &["mnt_parent"])?,
        mount_mountpoint: at("mount", &["mnt_mountpoint"])?,
        vfsmount_root: at("vfsmount", &["mnt_root"])?,
        nsproxy_net: at("nsproxy", &["net_ns"])?,
        net_cookie: at("net", &["net_cookie"])?,
        cred_cap_permitted: at("cred", &["cap_permitted"])?,
        css_set_dfl_cgrp: at("css_set", &["dfl_cgrp"])?,
        css_set_pids: pids_slot(&btf, at("css_set", &["subsys"])?),
        css_cgroup: at("cgroup_subsys_state", &["cgroup"])?,
        cgroup_kn: at("cgroup", &["kn"])?,
        kernfs_name: at("kernfs_node", &["name"])?,
        // Renamed in Linux 6.15.
        kernfs_parent: at("kernfs_node", &["__parent", "parent"])?,
        files_fdt: at("files_struct", &["fdt"])?,
        fdtable_max_fds: at("fdtable", &["max_fds"])?,
        fdtable_fd: at("fdtable", &["fd"])?,
        inode_mode: at("inode", &["i_mode"])?,
        inode_ino: at("inode", &["i_ino"])?,
        inode_sb: at("inode", &["i_sb"])?,
        inode_size: at("inode", &["i_size"])?,
        inode_ctime_sec: ctime.0,
        inode_ctime_nsec: ctime.1,
        sb_dev: at("super_block", &["s_dev"])?,
        socket_sk: at("socket", &["sk"])?,
        // struct sock begins with struct sock_common.
        sock_family: at("sock_common", &["skc_family"])?,
        sock_cookie: at("sock_common", &["skc_cookie"])?,
        sock_type: at("sock", &["sk_type"])?,
        sock_socket: at("sock", &["sk_socket"])?,
        sock_daddr: at("sock_common", &["skc_daddr"])?,
        sock_dport: at("sock_common", &["skc_dport"])?,
        sock_v6_daddr: member(&btf, "sock_common", "skc_v6_daddr").unwrap_or(0),
        sock_addr_uaddr: member(&btf, "bpf_sock_addr_kern", "uaddr").unwrap_or(0),
        sock_addr_uaddrlen: member(&btf, "bpf_sock_addr_kern", "uaddrlen").unwrap_or(0),
        task_status: at("task_struct", &["thread_info"])?
            + member(&btf, "thread_info", "status").unwrap_or(0),
        kiocb_filp: at("kiocb", &["ki_filp"])?,
        socket_file: at("socket", &["file"])?,
        msghdr_iter: at("msghdr", &["msg_iter"])?,
        msghdr_flags: at("msghdr", &["msg_flags"])?,
        iter_type: at("iov_iter", &["iter_type", "type"])?,
        iter_offset: at("iov_iter", &["iov_offset"])?,
        // Renamed in Linux 6.4; one union with `ubuf` since 6.0.
        iter_data: at("iov_iter", &["__iov", "iov"])?,
        iter_segments: at("iov_iter", &["nr_segs"])?,
        iter_ubuf: enumerator(&btf, "iter_type", "ITER_UBUF").unwrap_or(u32::MAX),
        iter_iovec: enumerator(&btf, "iter_type", "ITER_IOVEC").unwrap_or(u32::MAX),
        uring_file: member(&btf, "io_kiocb", "file").unwrap_or(0),
        uring_opcode: member(&btf, "io_kiocb", "opcode").unwrap_or(0),
        unix_peer: at("unix_sock", &["peer"])?,
        unix_addr: at("unix_sock", &["addr"])?,
        unix_address_len: at("unix_address", &["len"])?,
        unix_address_name: at("unix_address", &["name"])?,
        sock_peer_pid: at("sock", &["sk_peer_pid"])?,
        // One word for each kind; PIDTYPE_TGID is the second (linux/pid.h).
        pid_task: at("pid", &["tasks"])? + 8,
        pid_number: at("pid", &["numbers"])? + at("upid", &["nr"])?,
        sb_magic: at("super_block", &["s_magic"])?,
        vfsmount_sb: at("vfsmount", &["mnt_sb"])?,
        scope_level: 0,
        scope: 0,
        uring_complete_args: parameters(&btf, "btf_trace_io_uring_complete").unwrap_or(0),
    })
}

/// Where `css_set.subsys` holds the pids controller; 0 if the kernel has none.
fn pids_slot(btf: &Btf, subsys: u32) -> u32 {
    enumerator(btf, "cgroup_subsys_id", "pids_cgrp_id").map_or(0, |id| subsys + id * 8)
}

/// Value of an enumeration's member.
fn enumerator(btf: &Btf, enumeration: &str, name: &str) -> Option<u32> {
    btf.resolve_types_by_name(enumeration).ok()?.into_iter().find_map(|t| {
        let Type::Enum(members) = t else { return None };
        members.members.iter().find(|m| btf.resolve_name(*m).is_ok_and(|n| n == name)).map(|m| m.val())
    })
}

/// How many parameters a tracepoint's program gets, by the type that the kernel
/// declares for it (`typedef void (*btf_trace_…)(void *, …)`).
fn parameters(btf: &Btf, tracepoint: &str) -> Option<u32> {
    btf.resolve_types_by_name(tracepoint).ok()?.into_iter().find_map(|t| {
        let Type::Typedef(typedef) = t else { return None };
        let Ok(Type::Ptr(pointer)) = btf.resolve_chained_type(&typedef) else { return None };
        let Ok(Type::FuncProto(function)) = btf.resolve_chained_type(&pointer) else { return None };
        // The first is the tracepoint's own.
        Some((function.parameters.len() as u32).saturating_sub(1))
    })
}

/// Byte offset of a member, anonymous structures and unions looked through.
fn member(btf: &Btf, structure: &str, field: &str) -> Option<u32> {
    btf.resolve_types_by_name(structure).ok()?.into_iter().find_map(|t| match t {
        Type::Struct(s) | Type::Union(s) => member_of(btf, &s, field, 0),
        _ => None,
    })
}

fn member_of(btf: &Btf, s: &btf_rs::Struct, field: &str, depth: u32) -> Option<u32> {
    const DEPTH: u32 = 8;
    for m in &s.members {
        let name = btf.resolve_name(m).unwrap_or_default();
        if name == field {
            return Some(m.bit_offset() / 8);
        }
        if name.is_empty()
            && depth < DEPTH
            && let Ok(Type::Struct(inner) | Type::Union(inner)) = btf.resolve_chained_type(m)
            && let Some(offset) = member_of(btf, &inner, field, depth + 1)
        {
            return Some(m.bit_offset() / 8 + offset);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_every_field() {
        if !Path::new(VMLINUX).exists() {
            println!("skipped: {VMLINUX} does not exist");
            return;
        }
        let o = offsets().expect("offsets");
        assert!(o.task_tgid > 0 && o.mm_arg_end == o.mm_arg_start + 8 && o.mount_mnt > 0);
        assert!(
            o.inode_ino > 0
                && o.sb_dev > 0
                && o.inode_ctime_sec > 0
                && o.inode_ctime_nsec > o.inode_ctime_sec
        );
    }

    #[test]
    fn a_file_that_is_no_btf_is_an_error() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), b"not btf").expect("write");
        assert!(matches!(offsets_of(file.path()), Err(BtfError::Read(_))));
    }
}
