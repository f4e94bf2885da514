//! Hardware virtualisation.

use std::{
    fs::{self, OpenOptions},
    io,
};

/// The device.
pub const PATH: &str = "/dev/kvm";

/// Checks whether ordinary guests run on `/dev/kvm`.
///
/// Some clouds have a KVM without VT-x or AMD-V (such as `kvm_pvm`), on which an ordinary guest
/// kernel hangs.
pub fn usable() -> Result<(), String> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    judge(opened.map(drop), &cpuinfo)
}

fn judge(opened: io::Result<()>, cpuinfo: &str) -> Result<(), String> {
    let extended = cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm");
    match opened {
        Ok(()) if extended => Ok(()),
        Ok(()) => {
            Err("/dev/kvm exists, but the CPU has neither vmx nor svm; ordinary guests hang on \
             such a KVM, so QEMU emulates in software"
                .to_owned())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err("there is no /dev/kvm, so QEMU emulates in software".to_owned())
        }
        Err(error) => {
            Err(format!("/dev/kvm cannot be opened ({error}), so QEMU emulates in software"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH: &str = "processor\t: 0\nflags\t\t: fpu vmx sse\nbugs\t\t: svm_none\n";
    const WITHOUT: &str = "processor\t: 0\nmodel name\t: vmx svm\nflags\t\t: fpu sse\n";

    #[test]
    fn kvm_is_usable_where_it_opens_and_the_cpu_has_the_extension() {
        assert_eq!(judge(Ok(()), WITH), Ok(()));
        assert_eq!(judge(Ok(()), "flags : svm\n"), Ok(()));
    }

    #[test]
    fn a_device_without_the_extension_is_not_believed() {
        let reason = judge(Ok(()), WITHOUT).unwrap_err();
        assert!(reason.contains("neither vmx nor svm"), "{reason}");
        assert!(judge(Ok(()), "").is_err());
    }

    #[test]
    fn a_device_that_does_not_open_is_named_with_the_cause() {
        let gone = judge(Err(io::ErrorKind::NotFound.into()), WITH).unwrap_err();
        assert!(gone.contains("there is no /dev/kvm"), "{gone}");
        let denied = judge(Err(io::ErrorKind::PermissionDenied.into()), WITH).unwrap_err();
        assert!(denied.contains("permission denied"), "{denied}");
    }
}
