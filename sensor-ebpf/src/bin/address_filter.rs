//! Benchmark rival: what systemd's `IPAddressAllow=`/`IPAddressDeny=` does
//! with each packet of a unit: one look-up in the trie of allowed addresses,
//! then one in the trie of denied ones (systemd's `bpf-firewall.c`).
#![no_std]
#![allow(clippy::needless_pass_by_value, reason = "aya's macros hand contexts over by value")]
#![no_main]

use aya_ebpf::{
    macros::{cgroup_skb, map},
    maps::{LpmTrie, lpm_trie::Key},
    programs::SkBuffContext,
};

#[map]
static ALLOW4: LpmTrie<[u8; 4], u8> = LpmTrie::with_max_entries(1024, 0);
#[map]
static DENY4: LpmTrie<[u8; 4], u8> = LpmTrie::with_max_entries(1024, 0);
#[map]
static ALLOW6: LpmTrie<[u8; 16], u8> = LpmTrie::with_max_entries(1024, 0);
#[map]
static DENY6: LpmTrie<[u8; 16], u8> = LpmTrie::with_max_entries(1024, 0);

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

#[cgroup_skb(egress)]
fn filter_egress(ctx: SkBuffContext) -> i32 {
    verdict(&ctx, 16, 24)
}

#[cgroup_skb(ingress)]
fn filter_ingress(ctx: SkBuffContext) -> i32 {
    verdict(&ctx, 12, 8)
}

/// The offsets of the other side's address in an IPv4 and an IPv6 header.
#[inline(always)]
fn verdict(ctx: &SkBuffContext, offset4: usize, offset6: usize) -> i32 {
    // SAFETY: the verifier knows the context and allows this field to be read.
    let protocol = u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16);
    match protocol {
        ETH_P_IP => {
            let Ok(address) = ctx.load::<[u8; 4]>(offset4) else { return 0 };
            let key = Key::new(32, address);
            if ALLOW4.get(&key).is_some() {
                return 1;
            }
            DENY4.get(&key).is_none() as i32
        }
        ETH_P_IPV6 => {
            let Ok(address) = ctx.load::<[u8; 16]>(offset6) else { return 0 };
            let key = Key::new(128, address);
            if ALLOW6.get(&key).is_some() {
                return 1;
            }
            DENY6.get(&key).is_none() as i32
        }
        _ => 1,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
