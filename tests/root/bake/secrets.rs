//! Variables and secrets through the program itself: every stream, the log, the region's files and the baked disk.

use oven_testing::{LocalWorld, stderr};
use std::process::{Command, Output};

const TOKEN: &str = "hunter2-9f8e7d6c";

/// A region with a small Debian as `small`, and the definition `image` on it.
fn world(toml: &str, script: &str) -> LocalWorld {
    let world = LocalWorld::empty();
    let base = std::env::var("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    world.expect(0, &["import", &base, "--name", "small"]);
    world.write("image/image.toml", &format!("from = {{ name = \"small\" }}\n{toml}"));
    world.write("image/s.sh", &format!("#!/bin/sh -e\n{script}\n"));
    world
}

fn with_token(world: &LocalWorld, args: &[&str]) -> Output {
    world.command(args).env("TOKEN", TOKEN).output().unwrap()
}

/// Fails if any file of the region, its disks and logs among them, holds this.
fn ensure_nowhere(world: &LocalWorld, text: &str) {
    let found = Command::new("grep").args(["-rlaF", text]).arg(world.region()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "{text} is in the region");
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(output))
}

const SECRET: &str = "[[run]]\nscript = \"s.sh\"\nsecrets = [\"TOKEN\"]\n";

#[test]
fn a_secret_is_printed_nowhere_and_a_new_one_makes_no_new_image() {
    let world = world(
        SECRET,
        "set -x\necho \"token: $TOKEN\"\necho \"{\\\"a\\\": \\\"$TOKEN\\\"}\" >&2\necho done > /etc/done",
    );
    // Missing: nothing is begun.
    let (_, error) = world.expect(3, &["bake", "image"]);
    assert!(
        error.contains(
            "image/image.toml:4: `secrets` of [[run]] names TOKEN, which is not set in oven's environment"
        ),
        "{error}"
    );
    assert!(!world.files().iter().any(|file| file.contains("vol")), "{:?}", world.files());
    let (plan, _) = world.expect(0, &["plan", "image"]);
    assert!(plan.contains("with the secret TOKEN (not in the environment"), "{plan}");
    for flags in [&["--json"][..], &["-v"], &[]] {
        let args = [&["bake", "image", "--force"][..], flags].concat();
        let output = with_token(&world, &args);
        assert_eq!(output.status.code(), Some(0), "{}", told(&output));
        assert!(!told(&output).contains("hunter2"), "{}", told(&output));
        assert_eq!(told(&output).contains("token: ***"), !flags.is_empty(), "{}", told(&output));
    }
    ensure_nowhere(&world, "hunter2");
    ensure_nowhere(&world, "9f8e7d6c");
    // Without a bake no secret is needed.
    let image = with_token(&world, &["bake", "image"]);
    let again = world.expect(0, &["bake", "image"]).0;
    assert_eq!(String::from_utf8_lossy(&image.stdout), again);
    let shown = told(&with_token(&world, &["plan", "image", "--json"]));
    assert!(shown.contains(r#""secrets":{"TOKEN":true}"#) && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn only_permitted_secrets_are_passed_on() {
    let world = world(
        "[[run]]\nscript = \"s.sh\"\nsecrets = [\"TOKEN\"]\n[[test]]\ncommand = [\"true\"]\nsecrets = [\"OTHER\"]\n",
        "test \"$TOKEN\" = hunter2-9f8e7d6c",
    );
    let bake = |ci: Option<&str>, flags: &[&str]| {
        let mut command = world.command(&[&["bake", "image"], flags].concat());
        command.env("TOKEN", TOKEN).env("OTHER", "other-secret").envs(ci.map(|ci| ("CI", ci)));
        command.output().unwrap()
    };
    let before = world.files();
    for (ci, flags, named) in [
        (Some("true"), &[][..], &["--secret OTHER", "--secret TOKEN", "In CI"][..]),
        (
            None,
            &["--secret", "TOKEN"],
            &["--secret OTHER", "image/image.toml:7: `secrets` of [[test]] names OTHER"],
        ),
        (
            Some("1"),
            &["--secret", "OTHER"],
            &["--secret TOKEN", "image/image.toml:4: `secrets` of [[run]] names TOKEN"],
        ),
    ] {
        let output = bake(ci, flags);
        assert_eq!(output.status.code(), Some(3), "{}", told(&output));
        for text in named {
            assert!(told(&output).contains(text), "{text}: {}", told(&output));
        }
        assert_eq!(world.files(), before, "a refused bake begins nothing");
    }
    let output = bake(Some("true"), &["--secret", "TOKEN", "--secret", "OTHER"]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    ensure_nowhere(&world, "hunter2");
}

/// A checkout has credentials in `.git/config`. Steps see neither the checkout's `.git` nor that of an input.
#[test]
fn a_script_does_not_see_git_directories() {
    let world = world(
        "inputs = [\"../shared\"]\n[[run]]\nscript = \"s.sh\"\n",
        "cd /run/oven\nif grep -r 'hunter''2' definition shared; then exit 1; fi\n\
         ls -A definition/a/.git shared/.git\ntest ! -s definition/b/.git\ntest ! -s shared/sub/.git\n\
         cat definition/seen shared/seen\n",
    );
    // Without a `.git` in or above the definition, the oven.toml marks the project.
    world.write("oven.toml", "");
    for path in ["image/b/.git", "image/a/.git/config", "shared/.git/config", "shared/sub/.git"] {
        world.write(path, TOKEN);
    }
    world.write("image/seen", "seen one\n");
    world.write("shared/seen", "seen two\n");
    let (out, err) = world.expect(0, &["bake", "-v", "image"]);
    assert!(err.contains("seen one") && err.contains("seen two"), "{out}{err}");
    assert!(!err.contains("config"), "{err}");
    ensure_nowhere(&world, "hunter2");
}

#[test]
fn a_secret_in_a_failure_is_masked_on_every_stream() {
    let world = world(SECRET, "echo \"$TOKEN\"\necho \"$TOKEN\" > \"/etc/$TOKEN\"\nexit \"${FAIL:-0}\"");
    for flags in [&["--json"][..], &["-v"], &[]] {
        let output = with_token(&world, &[&["bake", "image"][..], flags].concat());
        assert_eq!(output.status.code(), Some(5), "{}", told(&output));
        assert!(!told(&output).contains("hunter2"), "{}", told(&output));
        assert!(told(&output).contains("/etc/***: contains the secret TOKEN"), "{}", told(&output));
    }
    let last = told(&with_token(&world, &["bake", "image", "--json"]));
    let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert!(last["images"][0]["error"].as_str().unwrap().contains("/etc/***"), "{last}");
    let logs =
        Command::new("grep").args(["-rlaF", "hunter2"]).arg(world.path("region/logs")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&logs.stdout), "");
}

#[test]
fn a_variable_makes_another_image_and_is_explained() {
    let toml = "[vars]\nport = \"80\"\n[[run]]\nscript = \"s.sh\"\n[[file]]\nsource = \"site.conf\"\ntarget = \"/etc/site.conf\"\n\
                template = true\n";
    let world = world(toml, "cat /etc/site.conf\ntest \"listen $port\" = \"$(cat /etc/site.conf)\"");
    world.write("image/site.conf", "listen {{ port }}\n");
    let first = world.expect(0, &["bake", "image"]).0;
    assert_eq!(world.expect(0, &["bake", "image", "--var", "port=80"]).0, first, "the default, said");
    let (plan, _) = world.expect(0, &["plan", "image", "--var", "port=8080"]);
    assert!(plan.contains("the variable port changed: \"80\" -> \"8080\""), "{plan}");
    assert!(plan.contains("with port = \"8080\" (--var)"), "{plan}");
    let (second, log) = world.expect(0, &["bake", "image", "--var", "port=8080", "-v"]);
    assert_ne!(second, first);
    assert!(log.contains("listen 8080"), "{log}");
    let (_, error) = world.expect(2, &["bake", "image", "--var", "prot=1"]);
    assert!(
        error.contains("--var prot: no definition declares this variable") && error.contains("`port`"),
        "{error}"
    );
    for wrong in ["port", "=1", "a-b=1"] {
        world.expect(2, &["bake", "image", "--var", wrong]);
    }
    world.expect(2, &["plan", "image", "--var", "port=1", "--compat", "gumgum"]);
    // A template that cannot be filled in is a mistake of the definition.
    world.write("image/site.conf", "\nlisten {{ prot }}\n");
    let (_, error) = world.expect(3, &["bake", "image"]);
    assert!(
        error.contains("image/image.toml:7: `source` of [[file]]") && error.contains("site.conf:2: `prot`"),
        "{error}"
    );
}
