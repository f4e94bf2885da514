//! The recipes of `docs/recipes.md`, run as they are written.

use std::{
    ffi::OsStr,
    fs,
    panic::resume_unwind,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use crate::support::{Host, Setup, command, example, wait_for, wait_until};

/// A recipe of the page: its heading, its language, and what is to be run.
struct Recipe {
    heading: String,
    language: String,
    text: String,
}

fn recipes() -> Vec<Recipe> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes.md");
    let page = fs::read_to_string(page).unwrap();
    let mut recipes = Vec::new();
    for section in page.split("\n## ").skip(1) {
        let heading = section.lines().next().unwrap().to_owned();
        for block in section.split("\n```").skip(1).step_by(2) {
            let (language, text) = block.split_once('\n').unwrap();
            let (heading, language) = (heading.clone(), language.to_owned());
            recipes.push(Recipe { heading, language, text: text.to_owned() });
        }
    }
    recipes
}

/// Makes a recipe ready to be run in the tree, which is elsewhere than the page says. What has
/// to be built is built by now, into `scratch`.
fn prepare(host: &Host, recipe: &Recipe, scratch: &Path) -> Command {
    let mount = host.mount().to_str().unwrap();
    let text = recipe.text.replace("/tmp/", &format!("{}/", scratch.display()));
    let text = text.replace("/run/sandboxes", mount);
    let mut ready = match &*recipe.language {
        "sh" => with_args("/bin/sh", ["-ec", &text]),
        "python" => with_args("/usr/bin/python3", ["-c", &text]),
        "js" => with_args("/usr/bin/node", ["-e", &text]),
        "go" => built_by_go(&text, scratch),
        "rust" => built_by_cargo(&text),
        "ini" => verified_by_systemd(&text, scratch),
        other => panic!("{}: nothing runs {other}", recipe.heading),
    };
    ready.current_dir(mount).stdin(Stdio::null());
    ready
}

fn with_args<const N: usize>(program: impl AsRef<OsStr>, args: [&str; N]) -> Command {
    let mut command = command(program);
    command.args(args);
    command
}

fn build(mut builder: Command) {
    let output = builder.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{builder:?}: {} {said}", output.status);
}

/// With the packages that the distribution has, so that nothing is downloaded.
fn built_by_go(text: &str, scratch: &Path) -> Command {
    let (source, program) = (scratch.join("main.go"), scratch.join("program"));
    fs::write(&source, text).unwrap();
    let mut go = with_args("go", ["build", "-o"]);
    go.arg(&program).arg(&source).env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode");
    // It builds its own library at first, which takes it a while.
    go.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go"));
    build(go);
    command(program)
}

/// The text is an example of this crate, so that it has the library that it needs.
fn built_by_cargo(text: &str) -> Command {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(manifest.join("tests/e2e/waiter/main.rs")).unwrap();
    assert_eq!(source.trim_end(), text, "the page has the text of the example");
    command(example("waiter"))
}

/// A unit is in the file that its first line names. It is looked at together with those before.
fn verified_by_systemd(text: &str, scratch: &Path) -> Command {
    let name = text.lines().next().unwrap().rsplit_once('/').unwrap().1;
    let (path, units) = (scratch.join(name), scratch.display());
    fs::write(&path, text).unwrap();
    let service = scratch.join("web-1.service");
    if !service.exists() {
        fs::write(service, "[Service]\nExecStart=/bin/true\n").unwrap();
    }
    // It only warns of a key that it does not know, so what it says is told as well.
    let mut systemd = with_args("/bin/sh", ["-c", "systemd-analyze verify --man=no \"$0\" 2>&1"]);
    systemd.arg(path).env("SYSTEMD_UNIT_PATH", format!("{units}:"));
    systemd
}

/// Runs a recipe; it has to succeed.
fn run(heading: &str, ready: &mut Command) -> String {
    let output = ready.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{heading}: {} {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Says whether a program that runs in the tree watches something, or has a state open.
fn is_watched(host: &Host) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let ours = processes
        .filter(|process| fs::read_link(process.join("cwd")).is_ok_and(|dir| dir == host.mount()));
    let files = ours.filter_map(|process| fs::read_dir(process.join("fd")).ok()).flatten();
    let mut links = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    links.any(|link| link.ends_with("web-1/state") || link == Path::new("anon_inode:inotify"))
}

#[test]
fn each_recipe_does_what_its_heading_says() {
    // A busy machine may need longer for all of them than one is idle by default.
    let host = Setup::counter("").config("[defaults]\nidle_after = \"7d\"").start();
    for id in ["web-1", "web-2", "web-3"] {
        host.boot(id);
    }
    host.sleep("web-2");
    host.mkdir("web-4").unwrap();
    let state = || host.state("web-1");
    for recipe in recipes() {
        let heading = &*recipe.heading;
        // One of them lists who had no activity for ten minutes.
        host.bash_ok("touch web-?/activity");
        match heading {
            "Keep it awake while a command runs"
            | "with-sandbox: the same as a command"
            | "Hold it in Python" => host.sleep("web-1"),
            _ => {}
        }
        let count = host.number("web-1/activity", "count");
        let waits = heading.starts_with("Wait until it sleeps");
        let said = thread::scope(|scope| {
            if waits {
                host.wake("web-1");
            }
            let scratch = tempfile::tempdir().unwrap();
            let mut ready = prepare(&host, &recipe, scratch.path());
            let running = scope.spawn(move || (run(heading, &mut ready), scratch));
            if waits {
                wait_until("it watches", || running.is_finished() || is_watched(&host));
                host.sleep("web-1");
            }
            running.join().unwrap_or_else(|panic| resume_unwind(panic)).0
        });
        match heading {
            _ if waits => assert_eq!(state(), "snapshotted", "{heading}"),
            "Run something at each change, with systemd" => assert_eq!(said, "", "{heading}"),
            "What happened to it last, and who did it" => {
                assert!(said.contains("\"to\":\"snapshotted\""), "{heading}: {said}");
                assert!(said.contains("\"cause\":\"write by pid "), "{heading}: {said}");
                host.wake("web-1");
            }
            "Keep it awake while a command runs" | "Hold it in Python" => {
                assert_eq!(state(), "running", "{heading}");
            }
            "with-sandbox: the same as a command" => assert_eq!(said.trim(), "1", "{heading}"),
            "Keep it awake without holding a file" => {
                assert_eq!(host.number("web-1/activity", "count"), count + 1, "{heading}");
            }
            "Who keeps it awake, and why is it not asleep" => {
                assert!(said.starts_with("verdict active\nbecause "), "{heading}: {said}");
            }
            "Put it to sleep only if nothing happened since I looked" => {
                assert_eq!(state(), "snapshotted", "{heading}");
                host.wake("web-1");
            }
            "All that sleep, and all that run" => {
                assert_eq!(said, "web-2/state\nweb-1\nweb-3\n", "{heading}");
            }
            "Those that have been in their state for more than an hour"
            | "Those without activity for ten minutes" => assert_eq!(said, "", "{heading}"),
            "Put all to sleep, four at a time" => {
                let states = ["web-1", "web-2", "web-3", "web-4"].map(|id| host.state(id));
                let want = ["snapshotted", "snapshotted", "snapshotted", "stopped"];
                assert_eq!(states, want, "{heading}");
            }
            "How much memory the sleepers take on disk" => {
                assert!(said.trim().parse::<u64>().unwrap() > 3 << 16, "{heading}: {said}");
            }
            other => panic!("nobody knows what `{other}` has to do"),
        }
        assert_eq!(host.read("web-1/awake"), "", "{heading}: nothing holds it after that");
    }
}

#[test]
fn a_path_unit_is_told_of_a_change_by_the_reaper() {
    let host = Setup::counter("").config("[reaper]\ntick = \"1s\"").start();
    host.boot("web-1");
    // What `PathModified=` watches a file for, as systemd's path.c has it.
    let mask = "modify,attrib,close_write,create,delete,move,delete_self,move_self";
    let mut watcher = with_args("inotifywait", ["-q", "-e", mask, "--format", "%e", "state"]);
    watcher.current_dir(host.path("web-1")).stdout(Stdio::piped());
    let mut watcher = watcher.spawn().unwrap();
    wait_until("it watches", || {
        let files = fs::read_dir(format!("/proc/{}/fdinfo", watcher.id())).unwrap().flatten();
        let mut infos = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        infos.any(|info| info.contains("inotify wd:"))
    });
    host.write("web-1/idle_after", "1s").unwrap();
    wait_for("its watch ends", || watcher.try_wait().unwrap());
    let told = std::io::read_to_string(watcher.stdout.take().unwrap()).unwrap();
    assert_eq!(told, "MODIFY\n");
}
