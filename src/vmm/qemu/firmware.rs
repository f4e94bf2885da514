//! Whether a guest is still in its firmware, which is no place to be put to sleep in.
//!
//! The firmware reads kernel and command line out of a device of QEMU's that only
//! `-kernel` fills, and a QEMU that loads a snapshot is started without. A guest that was
//! saved before it had all of that would halt for ever after its wake.

/// Where the firmware is while no CPU uses paging: the last 64 KiB of the first MiB, and
/// of the first 4 GiB, where a CPU begins.
const FIRMWARE: [std::ops::Range<u64>; 2] = [0xf_0000..0x10_0000, 0xffff_0000..0x1_0000_0000];
/// The bit of CR0 that says that the CPU uses paging.
const PAGING: u64 = 1 << 31;

/// Says whether the CPU that `info registers` tells of executes firmware. None where it is
/// not told in a form that we know.
pub(super) fn is_firmware(registers: &str) -> Option<bool> {
    let after = |key| Some(registers.split_once(key)?.1.trim_start());
    let number = |text: &str| {
        let digits = text.split(|c: char| !c.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(digits, 16).ok()
    };
    // `EIP=` in 32-bit mode, `RIP=` in 64-bit mode.
    let instruction = number(after("IP=")?)?;
    let code_base = number(after("CS =")?.split_ascii_whitespace().nth(1)?)?;
    let paging = number(after("CR0=")?)? & PAGING != 0;
    let place = code_base.wrapping_add(instruction);
    Some(!paging && FIRMWARE.iter().any(|range| range.contains(&place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 7.2 prints, as much of it as matters.
    fn registers(instruction: &str, code_base: &str, cr0: &str) -> String {
        format!(
            "EAX=00000000 EBX=00000000 ECX=00000000 EDX=00060fb1\r\n\
             {instruction} EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n\
             ES =0000 00000000 0000ffff 00009300\r\n\
             CS =f000 {code_base} 0000ffff 00009b00\r\n\
             CR0={cr0} CR2=00000000 CR3=00000000 CR4=00000000\r\n"
        )
    }

    #[test]
    fn firmware_is_told_from_kernels() {
        for (instruction, code_base, cr0, firmware) in [
            ("EIP=0000fff0", "ffff0000", "60000010", true),
            ("EIP=000f01e1", "00000000", "00000011", true),
            ("EIP=000001e1", "000f0000", "00000010", true),
            ("EIP=0010002c", "00000000", "00000011", false),
            ("EIP=00000200", "00010000", "00000010", false),
            ("EIP=000f01e1", "00000000", "80000011", false),
            ("RIP=ffffffff81e00b1f", "0000000000000000", "80050033", false),
        ] {
            let told = registers(instruction, code_base, cr0);
            assert_eq!(is_firmware(&told), Some(firmware), "{told}");
        }
    }

    #[test]
    fn what_is_not_understood_says_nothing() {
        for told in ["", "EIP=", "EIP=0000fff0", "RIP=zz CS =f000 0 CR0=1", "unknown command"] {
            assert_eq!(is_firmware(told), None, "{told}");
        }
    }
}
