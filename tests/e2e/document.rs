//! Documents commit when they are closed: shown with the tools that people write files with.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    process::Stdio,
};

use rustix::io::Errno;

use crate::support::{Host, Setup, command, wait_until};

/// A host with a sandbox that denies two networks and has two vCPUs.
fn host() -> Host {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    host.write("web-1/config", "vcpus = 2\nmemory = \"32MiB\"\ncmdline = \"quiet\"\n").unwrap();
    host.write("web-1/net/denied", "10.0.0.0/8\n172.16.0.0/12\n").unwrap();
    host
}

/// A document that is longer than any buffer of the tools below.
fn networks(count: u32) -> String {
    (0..count).map(|n| format!("10.{}.{}.0/24\n", n / 256, n % 256)).collect()
}

#[test]
fn tools_write_a_list_as_they_write_any_file() {
    let host = host();
    let list = networks(1000);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &list).unwrap();
    let f = file.path().to_str().unwrap();
    for script in [
        "tee net/denied < F",
        "cp F net/denied",
        "cat F > net/denied",
        "while read line; do echo $line; done < F > net/denied",
        "exec 3> net/denied; while read line; do echo $line >&3; done < F; exec 3>&-",
        "{ head -n 500 F; tail -n 500 F; } > net/denied",
        "printf '%s\\n' $(cat F) > net/denied",
        "dd if=F of=net/denied bs=7 2> /dev/null",
        "dd if=F of=net/denied bs=7 conv=notrunc,fsync 2> /dev/null",
        "xargs -n 100 printf '%s\\n' < F > net/denied",
        "head -n 1 F > net/denied; tail -n +2 F >> net/denied",
        "head -n 1 F > net/denied; tail -n +2 F | tee -a net/denied",
        "head -n 1 F > net/denied; tail -n +2 F | while read l; do echo $l >> net/denied; done",
        "sed -n 'w net/denied' F",
        "awk '{ print > \"net/denied\" }' F",
        "busybox cp F net/denied",
        "busybox sh -c 'while read line; do echo $line; done < F > net/denied'",
        "python3 -c \"open('net/denied','w',7).write(open('F').read())\"",
        "python3 -c \"\nwith open('net/denied','w',1) as f: f.writelines(open('F'))\"",
        "perl -ne 'BEGIN { open O, \">net/denied\"; $| = 1 } print O' F",
        "ed -s F <<< $'w net/denied\\nq'",
        "(sleep 0; cat F) > net/denied",
        "sh -c 'exec > net/denied; cat F'",
    ] {
        host.write("web-1/net/denied", "192.0.2.0/24\n").unwrap();
        host.bash_ok(&format!("cd web-1; {}", script.replace('F', f)));
        assert_eq!(host.read("web-1/net/denied"), list, "{script}");
        assert_eq!(host.error("web-1"), "ok", "{script}");
    }
}

#[test]
fn editors_write_a_config_and_put_back_what_they_could_not_write() {
    let host = host();
    let before = host.read("web-1/config");
    let vim = "vim -Nes -u NONE --cmd 'set backupdir=/tmp directory=/tmp'";
    let home = tempfile::tempdir().unwrap();
    let vim = vim.replace("/tmp", home.path().to_str().unwrap());
    host.bash_ok(&format!("{vim} -c '%s/quiet/loud/' -c 'wq' web-1/config"));
    assert_eq!(host.read("web-1/config"), before.replace("quiet", "loud"));
    host.bash_ok("ed -s web-1/config <<< $'g/loud/s//quiet/\\nw\\nq'");
    assert_eq!(host.read("web-1/config"), before);
    // What is not accepted is told by the editor, which then writes the old text back.
    let spoilt = host.bash(&format!("{vim} -c '%s/vcpus/vcpsu/' -c 'w' -c 'q!' web-1/config"));
    assert!(host.error("web-1").contains("unknown key `vcpsu`") || spoilt.status.success());
    assert_eq!(host.read("web-1/config"), before);
    let spoilt = host.bash("ed -s web-1/config <<< $'g/vcpus/s//vcpsu/\\nw\\nQ'");
    assert!(!spoilt.status.success(), "{spoilt:?}");
    assert_eq!(host.read("web-1/config"), before);
}

#[test]
fn a_document_in_pieces_of_a_few_bytes_keeps_every_key() {
    let host = host();
    let before = host.read("web-1/config");
    // As an editor restores its backup.
    let file = host.open("web-1/config").unwrap();
    for piece in before.as_bytes().chunks(5) {
        (&file).write_all(piece).unwrap();
    }
    drop(file);
    host.bash_ok(
        "f=$(mktemp); cp web-1/config $f; dd if=$f of=web-1/config bs=3 2> /dev/null; rm $f",
    );
    assert_eq!(host.read("web-1/config"), before);
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(512).unwrap();
    let disk = format!("path = {:?}", disk.path());
    let script = format!("printf '[[disks]]\\n{disk}\\nreadonly = true\\n' >> web-1/config");
    let appended = host.bash(&script);
    assert!(appended.status.success(), "{}", host.error("web-1"));
    let after = host.read("web-1/config");
    assert!(after.contains(&disk) && after.contains("vcpus = 2\n"), "{after}");
}

#[test]
fn a_bad_line_fails_the_command_that_wrote_it_and_nothing_holds() {
    let host = host();
    let before = host.read("web-1/net/denied");
    let output =
        host.bash("cd web-1; { echo 10.1.0.0/16; echo nonsense; echo ok $?; } > net/denied");
    assert!(String::from_utf8_lossy(&output.stderr).contains("Invalid argument"), "{output:?}");
    assert!(host.error("web-1").contains("line 2: `nonsense`"), "{}", host.error("web-1"));
    assert_eq!(host.read("web-1/net/denied"), before);
    for script in [
        "echo 10.1.0.0/33 > web-1/net/denied",
        "echo 'memory = \"512Q\"' > web-1/config",
        "printf '10.1.0.0/16\\nx\\n' > web-1/net/denied",
        "printf '10.1.0.0/16\\nx\\n' | tee web-1/net/denied",
        "printf '10.1.0.0/16\\nx' | tee web-1/net/denied",
        "printf 'vcpus = ' | tee web-1/config",
        "f=$(mktemp); printf 'vcpus = 2' > $f; printf x >> $f; cp $f web-1/config",
    ] {
        let output = host.bash(script);
        assert!(!output.status.success(), "{script}: {output:?}");
        assert_ne!(host.error("web-1"), "ok", "{script}");
        assert_eq!(host.read("web-1/net/denied"), before, "{script}");
    }
    // A shell does not look at what close says; `error` has it all the same.
    host.bash_ok("printf 'vcpus = ' > web-1/config");
    assert!(host.error("web-1").contains("line 1"), "{}", host.error("web-1"));
    let long = format!("{}\n", "#".repeat(65_536));
    assert_eq!(host.write("web-1/config", long), Err(Errno::TOOBIG));
}

#[test]
fn nothing_is_in_force_before_the_close_and_a_childs_exit_is_none() {
    let host = host();
    let before = host.read("web-1/net/denied");
    let mut shell = command("/bin/bash");
    let script = "exec 3> web-1/net/denied; echo 10.1.0.0/16 >&3; bash -c 'echo 10.2.0.0/16 >&3'; \
                  echo written; read; exec 3>&-; echo closed; read";
    shell.args(["-c", script]).current_dir(host.mount());
    let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(shell.stdout.take().unwrap());
    let mut says = |what: &str| {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut said, &mut line).unwrap();
        assert_eq!(line.trim_end(), what);
    };
    says("written");
    assert_eq!(host.read("web-1/net/denied"), before);
    let mut stdin = shell.stdin.take().unwrap();
    stdin.write_all(b"\n").unwrap();
    says("closed");
    assert_eq!(host.read("web-1/net/denied"), "10.1.0.0/16\n10.2.0.0/16\n");
    drop(stdin);
    shell.wait().unwrap();
}

#[test]
fn a_writer_that_is_killed_commits_nothing_and_one_that_ends_without_closing_does() {
    let host = host();
    let before = host.read("web-1/net/denied");
    host.bash("cd web-1; bash -c 'exec > net/denied; echo 10.1.0.0/16; kill -9 $$'");
    wait_until("the kill is told", || host.error("web-1").contains("killed by signal 9"));
    assert_eq!(host.read("web-1/net/denied"), before);
    host.bash("cd web-1; bash -c 'exec > net/denied; echo 10.1.0.0/16; kill $$'");
    wait_until("the kill is told", || host.error("web-1").contains("killed by signal 15"));
    assert_eq!(host.read("web-1/net/denied"), before);
    host.bash("cd web-1; bash -c 'exec > net/denied; echo 10.1.0.0/16; exit 3'");
    assert_eq!(host.read("web-1/net/denied"), "10.1.0.0/16\n");
    // A child outlives who opened the file: what it writes is committed by the last close.
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo").display().to_string();
    host.bash_ok(&format!(
        "cd web-1; mkfifo {fifo}; bash -c 'exec > net/denied; \
         (read < {fifo}; echo 10.3.0.0/16) &'; echo > {fifo}"
    ));
    wait_until("the last close commits", || host.read("web-1/net/denied") == "10.3.0.0/16\n");
}

/// The kernel closes files that are close-on-exec in execve(2), where it lets nobody read most of
/// the `/proc` of that process: whoever does waits for the close to be answered.
#[test]
fn a_process_that_becomes_another_program_commits_what_that_closes() {
    let host = host();
    let become_another = |copies: usize, text: &str| {
        let script = format!(
            "import os, sys\nfd = os.open('net/denied', os.O_WRONLY | os.O_TRUNC)\n\
             os.write(fd, sys.argv[1].encode())\n\
             for _ in range({copies}): os.set_inheritable(os.dup(fd), True)\n\
             os.execv('/bin/sh', ['sh', '-c', 'exit 7'])"
        );
        let mut python = command("/usr/bin/python3");
        python.args(["-c", &script, text]).current_dir(host.path("web-1"));
        let mut python = python.spawn().unwrap();
        wait_until("the program ends", || python.try_wait().unwrap().is_some());
        assert_eq!(python.wait().unwrap().code(), Some(7));
    };
    become_another(0, "10.1.0.0/16\n");
    assert_eq!(host.read("web-1/net/denied"), "10.1.0.0/16\n");
    // The other program has copies of it open, and closes them by its end.
    for copies in [1, 2] {
        become_another(copies, &format!("10.2.{copies}.0/24\n"));
        assert_eq!(host.read("web-1/net/denied"), format!("10.2.{copies}.0/24\n"));
    }
}

#[test]
fn only_a_file_that_was_opened_to_append_begins_with_the_old_text() {
    let host = host();
    let file = File::options().write(true).open(host.path("web-1/net/denied")).unwrap();
    file.write_all_at(b"10.1.0.0/16\n", 0).unwrap();
    let apart = file.write_all_at(b"10.2.0.0/16\n", 100).unwrap_err();
    assert_eq!(Errno::from_io_error(&apart), Some(Errno::INVAL));
    assert!(host.error("web-1").contains("from its beginning"), "{}", host.error("web-1"));
    drop(file);
    assert_eq!(host.read("web-1/net/denied"), "10.0.0.0/8\n172.16.0.0/12\n");
    let file = OpenOptions::new().append(true).open(host.path("web-1/net/denied")).unwrap();
    (&file).write_all(b"10.1.0.0").unwrap();
    (&file).write_all(b"/16\n").unwrap();
    rustix::fs::fsync(&file).unwrap();
    assert_eq!(host.read("web-1/net/denied"), "10.0.0.0/8\n172.16.0.0/12\n10.1.0.0/16\n");
    // An update in place: read, go back, write, cut off.
    host.bash_ok(
        "python3 -c \"\nwith open('web-1/net/denied', 'r+') as f:\n text = f.read()\n f.seek(0)\n \
         f.write(text.replace('10.1', '10.9'))\n f.truncate()\"",
    );
    assert_eq!(host.read("web-1/net/denied"), "10.0.0.0/8\n172.16.0.0/12\n10.9.0.0/16\n");
    for script in
        [": > D", "truncate -s 0 D", "truncate -s 5 D", ": >> D", "cp /dev/null D", "exec 3<> D"]
    {
        host.bash_ok(&script.replace('D', "web-1/net/denied"));
    }
    assert!(host.read("web-1/net/denied").contains("10.9.0.0/16"));
    host.bash_ok("echo > web-1/net/denied");
    assert_eq!(host.read("web-1/net/denied"), "");
}

#[test]
fn entries_that_many_append_at_once_are_all_there() {
    let host = host();
    host.bash_ok(
        "for i in {1..30}; do echo 192.0.$i.0/24 >> web-1/net/denied & pids+=($!); done; \
         for pid in ${pids[@]}; do wait $pid || exit 1; done",
    );
    let denied = host.read("web-1/net/denied");
    assert_eq!(denied.lines().filter(|line| line.starts_with("192.0.")).count(), 30, "{denied}");
}

#[test]
fn a_process_that_has_opened_a_document_twice_commits_each_when_it_closes_that() {
    let host = host();
    for (file, one, other) in [
        ("web-1/net/denied", "10.1.0.0/16\n", "10.2.0.0/16\n"),
        ("web-1/config", "vcpus = 1\n", "vcpus = 3\n"),
    ] {
        let read = |what: &str| host.read(file).contains(what.trim_end());
        let (first, second) = (host.open(file).unwrap(), host.open(file).unwrap());
        (&first).write_all(one.as_bytes()).unwrap();
        (&second).write_all(other.as_bytes()).unwrap();
        // A copy that is closed is no close.
        drop(first.try_clone().unwrap());
        assert!(!read(one), "{file}");
        drop(first);
        assert!(read(one), "{file}");
        drop(second.try_clone().unwrap());
        assert!(!read(other), "{file}");
        drop(second);
        assert!(read(other), "{file}");
    }
    // As a shell has it, which closes a copy after each command.
    host.bash_ok(
        "cd web-1/net; exec 3> denied 4> denied; echo 10.3.0.0/16 >&3; echo 10.4.0.0/16 >&4; \
         echo 10.5.0.0/16 >&3; ! grep 10.3 denied || exit 1; exec 3>&-; \
         [ \"$(cat denied)\" = $'10.3.0.0/16\\n10.5.0.0/16' ] || exit 2; \
         echo 10.6.0.0/16 >&4; ! grep 10.4 denied || exit 3; exec 4>&-; \
         [ \"$(cat denied)\" = $'10.4.0.0/16\\n10.6.0.0/16' ] || exit 4",
    );
    assert_eq!(host.error("web-1"), "ok");
}
