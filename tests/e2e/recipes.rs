//! The recipes of `docs/recipes.md`, run as they are written.

use std::{fs, path::Path, thread};

use crate::support::{Host, Setup, command};

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

/// Runs a recipe in the tree, which is elsewhere than the page says; it has to succeed.
fn run(host: &Host, recipe: &Recipe) -> String {
    let mount = host.mount().to_str().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let text = recipe.text.replace("/tmp/", &format!("{}/", scratch.path().display()));
    let text = text.replace("/run/sandboxes", mount);
    let (program, flag) = match &*recipe.language {
        "sh" => ("/bin/sh", "-ec"),
        "python" => ("/usr/bin/python3", "-c"),
        "js" => ("/usr/bin/node", "-e"),
        other => panic!("{}: nothing runs {other}", recipe.heading),
    };
    let output = command(program).args([flag, &text]).current_dir(mount).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {} {said}", recipe.heading, output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn each_recipe_does_what_its_heading_says() {
    let host = Setup::counter("").start();
    for id in ["web-1", "web-2", "web-3"] {
        host.boot(id);
    }
    host.sleep("web-2");
    host.mkdir("web-4").unwrap();
    let state = || host.state("web-1");
    for recipe in recipes() {
        let heading = &*recipe.heading;
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
                scope.spawn(|| host.sleep("web-1"));
            }
            run(&host, &recipe)
        });
        match heading {
            _ if waits => assert_eq!(state(), "snapshotted", "{heading}"),
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
