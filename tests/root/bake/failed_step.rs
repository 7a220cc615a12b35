//! The failed step of a bake: the hint at the first failure, its record, a shell with its environment, and `--rerun`.

use super::story::small;
use oven_testing::{LocalWorld, stderr, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

const TOKEN: &str = "hunter2-9f8e7d6c";
const FLAG: &str = "--keep-on-failure";

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The id that a failed bake prints for `oven shell`.
fn run_of(error: &str) -> String {
    error.split(" shell ").nth(1).expect(error)[..8].to_owned()
}

/// The files of the records of failed steps.
fn records(world: &LocalWorld) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.region().join("steps")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn ensure_nowhere(world: &LocalWorld, text: &str) {
    let found = Command::new("grep").args(["-rlaF", text]).arg(world.region()).output().unwrap();
    assert_eq!(out(&found), "", "{text} is in the region");
}

#[test]
fn only_the_first_failure_of_a_step_names_the_flag() {
    let world = small();
    let failing = "from = { name = \"small\" }\n[vars]\nPORT = \"80\"\n[[run]]\ncommand = [\"false\"]\n";
    world.write("a/image.toml", failing);
    // The flag does not help here: no step ran, the bake was interrupted, or the flag is used already.
    world.write("wrong/image.toml", "from = { name = \"small\" }\nnmae = \"x\"\n");
    let (_, error) = world.expect(3, &["bake", "wrong"]);
    assert!(!error.contains(FLAG), "{error}");
    world.write("gone/image.toml", "from = { name = \"no-such-base\" }\n");
    let (_, error) = world.expect(4, &["bake", "gone"]);
    assert!(!error.contains(FLAG), "{error}");
    world.write(
        "long/image.toml",
        &failing.replace("[\"false\"]", "[\"sh\", \"-c\", \"echo begun; sleep 600\"]"),
    );
    let log = world.path("log");
    let mut long = world.command(&["-v", "bake", "long"]);
    let mut long = long.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let text = || fs::read_to_string(&log).unwrap();
    until("the step", || text().contains(" begun\n").then_some(()));
    kill_process(Pid::from_child(&long), Signal::INT).unwrap();
    assert_eq!(long.wait().unwrap().code(), Some(130), "{}", text());
    assert!(!text().contains(FLAG), "{}", text());
    let (_, error) = world.expect(5, &["bake", FLAG, "a"]);
    assert!(!error.contains(FLAG), "{error}");
    world.expect(0, &["sweep", "--kept"]);
    assert_eq!(records(&world), Vec::<PathBuf>::new());

    let (_, error) = world.expect(5, &["bake", "--force", "--var", "PORT=8 1", "a"]);
    let region = world.region();
    let region = region.to_str().unwrap();
    let command = format!("oven --region-dir {region} bake {FLAG} --force --var 'PORT=8 1' a");
    let hint = format!("To open a shell on the disk after the failure, preserve it: {command}\n");
    assert_eq!(error.matches(&hint).count(), 1, "{hint}{error}");
    assert!(!world.files().iter().any(|file| file.starts_with("steps/") || file.starts_with("volumes/")));
    for _ in 0..2 {
        let (_, error) = world.expect(5, &["bake", "a"]);
        assert!(!error.contains(FLAG), "{error}");
    }
    // The JSON of another machine's first failure has it, too, after the hint of the failure itself.
    fs::remove_file(world.region().join("hints/keep-on-failure")).unwrap();
    world.write("a/image.toml", &failing.replace("[\"false\"]", "[\"sleep\", \"60\"]\ntimeout = 1"));
    let (json, _) = world.expect(5, &["--json", "bake", "a"]);
    let events: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let error = events.iter().find(|event| event["event"] == "error").unwrap();
    let hint = error["hint"].as_str().unwrap();
    assert!(hint.starts_with("Increase `timeout` (in seconds) of the [[run]]. To open a shell "), "{hint}");
    assert!(hint.ends_with(&format!("bake {FLAG} a")), "{hint}");
    assert_eq!(events.last().unwrap()["images"][0]["hint"], error["hint"]);
    // The command of the hint works.
    let words: Vec<_> = hint.split_once(&format!("--region-dir {region} ")).unwrap().1.split(' ').collect();
    let (_, error) = world.expect(5, &words);
    world.expect(0, &["shell", &run_of(&error), "--", "true"]);
}

const TOML: &str = r#"from = { name = "small" }
inputs = ["../shared"]
[vars]
PORT = "80"
[[run]]
script = "s.sh"
args = ["a b", "it's"]
env = { MODE = "fast lane" }
secrets = ["TOKEN"]
"#;

const SCRIPT: &str = "#!/bin/sh -e
echo \"$PORT $MODE $1 $2 $TOKEN\"
cat ../shared/note
test \"$(grep -c : /proc/net/dev)\" = 1
echo ran >> /root/count
exit 7
";

/// A world in which `image` failed with `--keep-on-failure`, and the id of the run.
fn failed(disks: &str, toml: &str) -> (LocalWorld, String) {
    let world = small();
    world.write("oven.toml", "");
    world.write("image/image.toml", toml);
    world.write("image/s.sh", SCRIPT);
    world.write("shared/note", "a note\n");
    let args = ["--disks", disks, "bake", FLAG, "--var", "PORT=81", "image"];
    let output = world.command(&args).env("TOKEN", TOKEN).output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(5), "{error}");
    let run = run_of(&error);
    assert!(error.contains(&format!("shell --rerun {run}\n")), "{error}");
    (world, run)
}

#[test]
fn a_shell_has_everything_of_the_failed_step() {
    for disks in ["attached", "direct"] {
        let (world, run) = failed(disks, TOML);
        ensure_nowhere(&world, "hunter2");
        let [record] = &records(&world)[..] else { panic!("one record is expected") };
        let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(record), mode(record.parent().unwrap())), (0o600, 0o700));

        let shell = |environment: &[(&str, &str)], flags: &[&str]| {
            let script = "echo \"$PORT $MODE ${TOKEN-none}\"; pwd; cat s.sh ../shared/note; cat /root/count";
            let args = [&["shell"], flags, &[&run, "--", "sh", "-c", script][..]].concat();
            let output = world.command(&args).envs(environment.iter().copied()).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            (out(&output), stderr(&output))
        };
        let expected =
            |token: &str| format!("81 fast lane {token}\n/run/oven/definition\n{SCRIPT}a note\nran\n");
        let (printed, error) = shell(&[("TOKEN", TOKEN)], &[]);
        assert_eq!(printed, expected(TOKEN));
        let command = r"cd /run/oven/definition && /bin/sh -e /run/oven/definition/s.sh 'a b' 'it'\''s'";
        let place = "running s.sh (the [[run]] in line 5 of ";
        for part in [command, place, "shell --rerun "] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains("warning") && !error.contains("hunter2"), "{error}");
        // Secrets that are missing or not permitted are named.
        for (environment, flags, part) in [
            (&[][..], &[][..], "the secret TOKEN is not set in oven's environment"),
            (&[("TOKEN", TOKEN), ("CI", "true")], &[], "the secret TOKEN is not permitted (--secret TOKEN"),
            (&[("TOKEN", TOKEN)], &["--secret", "OTHER"], "the secret TOKEN is not permitted"),
        ] {
            let (printed, error) = shell(environment, flags);
            assert_eq!(printed, expected("none"));
            assert!(error.contains(part), "{part}: {error}");
        }
        let ci = [("TOKEN", TOKEN), ("CI", "true")];
        assert_eq!(shell(&ci, &["--secret", "TOKEN"]).0, expected(TOKEN));
        world.assert_no_traces("after the shells");

        // A changed definition is reported, and a definition that is gone.
        world.write("image/extra", "x");
        let (_, error) = shell(&ci[..1], &[]);
        assert!(error.contains("image has changed since the run failed"), "{error}");
        fs::rename(world.path("image"), world.path("moved")).unwrap();
        let output = world.command(&["shell", &run, "--", "pwd"]).env("TOKEN", TOKEN).output().unwrap();
        assert_eq!(
            (output.status.code(), out(&output).as_str()),
            (Some(0), "/root\n"),
            "{}",
            stderr(&output)
        );
        assert!(stderr(&output).contains("which the step saw as /run/oven/definition, no longer exists"));

        // A damaged record is named. Without it, the shell opens as before.
        let whole = fs::read_to_string(record).unwrap();
        fs::write(record, &whole[..whole.len() / 2]).unwrap();
        for args in [&["shell", &run, "--", "true"][..], &["shell", "--rerun", &run]] {
            let (_, error) = world.expect(8, args);
            assert!(
                error.contains(record.to_str().unwrap()) && error.contains("Remove this file"),
                "{error}"
            );
        }
        fs::remove_file(record).unwrap();
        assert_eq!(world.expect(0, &["shell", &run, "--", "pwd"]).0, "/root\n");
        let (_, error) = world.expect(4, &["shell", "--rerun", &run]);
        assert!(
            error.contains("no record of a failed step") && error.contains(&format!("shell {run}")),
            "{error}"
        );
        fs::write(record, whole).unwrap();
        world.expect(0, &["sweep", "--kept", "--run", &run]);
        assert_eq!(records(&world), Vec::<PathBuf>::new());
        world.assert_no_traces("after the sweep");
    }
}

#[test]
fn the_failed_step_runs_again_as_in_the_bake() {
    for disks in ["attached", "direct"] {
        let (world, run) = failed(disks, TOML);
        let rerun = |flags: &[&str]| {
            let args = [flags, &["shell", "--rerun", &run]].concat();
            world.command(&args).env("TOKEN", TOKEN).output().unwrap()
        };
        let count = || world.expect(0, &["shell", &run, "--", "cat", "/root/count"]).0;
        let output = rerun(&[]);
        assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
        assert_eq!(out(&output), "81 fast lane a b it's ***\na note\n");
        assert_eq!(count(), "ran\nran\n");
        let output = rerun(&["--json"]);
        assert_eq!(output.status.code(), Some(7));
        let events: Vec<Value> =
            out(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let lines = events.iter().filter(|event| event["event"] == "output").map(|event| &event["line"]);
        assert_eq!(json!(lines.collect::<Vec<_>>()), json!(["81 fast lane a b it's ***", "a note"]));
        assert_eq!(events.last().unwrap()["exit_code"], 7);
        // A secret that is missing is an error, and nothing runs.
        let (printed, error) = world.expect(3, &["shell", "--rerun", &run]);
        assert!(
            printed.is_empty() && error.contains("the secret TOKEN is not set in oven's environment"),
            "{error}"
        );
        assert_eq!(count(), "ran\nran\nran\n");
        // The repaired script.
        world.write("image/s.sh", &SCRIPT.replace("exit 7", "exit 0"));
        let output = rerun(&[]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stderr(&output).contains("has changed since the run failed"), "{}", stderr(&output));
        // A script that a signal kills.
        world.write("image/s.sh", "#!/bin/sh\nkill -9 $$\n");
        assert_eq!(rerun(&[]).status.code(), Some(137));
        fs::rename(world.path("image"), world.path("moved")).unwrap();
        let output = rerun(&[]);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(stderr(&output).contains("the step cannot run again: ") && out(&output).is_empty());
        ensure_nowhere(&world, "hunter2");
        world.assert_no_traces("after the step ran again");
    }
    let world = small();
    let (_, error) = world.expect(2, &["shell", "--rerun", "ami-0123456789abcdef0"]);
    assert!(error.contains("--rerun needs the id of a run"), "{error}");
}

/// A test's writes are discarded, a step sees the `.git` of no definition, and a value of a secret is not recorded.
#[test]
fn a_step_runs_again_with_the_same_containment() {
    let script = "cat sub/.git/config; echo more >> /root/count; cat /root/count; exit 9";
    let toml = TOML.replace(
        "[[run]]\nscript = \"s.sh\"\nargs = [\"a b\", \"it's\"]",
        "[[test]]\ncommand = [\"sh\", \"-c\", SCRIPT]",
    );
    let toml = toml.replace("SCRIPT", &json!(script).to_string());
    let (world, run) = failed("attached", &toml);
    // This directory appeared after the bake.
    world.write("image/sub/.git/config", "credential");
    let output = |n: u32| {
        let output = world.command(&["shell", "--rerun", &run]).env("TOKEN", TOKEN).output().unwrap();
        assert_eq!(output.status.code(), Some(9), "{n}: {}", stderr(&output));
        assert!(
            out(&output).ends_with("more\n") && out(&output).matches("more").count() == 1,
            "{}",
            out(&output)
        );
        assert!(!out(&output).contains("credential"));
    };
    (0..2).for_each(output);
    world.expect(0, &["sweep", "--kept"]);

    world.write("image/image.toml", &toml.replace("fast lane", TOKEN));
    let bake = world.command(&["bake", FLAG, "image"]).env("TOKEN", TOKEN).output().unwrap();
    assert_eq!(bake.status.code(), Some(5), "{}", stderr(&bake));
    let error = stderr(&bake);
    assert!(
        error.contains("contains the value of the secret TOKEN") && !error.contains("--rerun"),
        "{error}"
    );
    assert_eq!(records(&world), Vec::<PathBuf>::new());
    ensure_nowhere(&world, "hunter2");
}

/// The step that installs packages runs again with the packages that the bake downloaded, although it has changed the
/// package sources.
#[test]
fn a_package_step_runs_again() {
    let world = small();
    let control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.example>\nDepends: tree\nDescription: x\n";
    world.write("deb/DEBIAN/control", control);
    world.write("deb/DEBIAN/postinst", "#!/bin/sh\necho the script ran\ntest -e /etc/repaired\n");
    fs::set_permissions(world.path("deb/DEBIAN/postinst"), fs::Permissions::from_mode(0o755)).unwrap();
    // dpkg unpacks this file before the script fails.
    world.write("deb/etc/apt/apt.conf.d/99x", "APT::Install-Suggests \"false\";\n");
    world.write("image/image.toml", "from = { name = \"small\" }\npackages = [\"./x.deb\"]\n");
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Znone", "--build"]).arg(world.path("deb"));
    let built = build.arg(world.path("image/x.deb")).output().unwrap();
    assert!(built.status.success(), "{}", stderr(&built));
    let (_, error) = world.expect(5, &["bake", FLAG, "image"]);
    let run = run_of(&error);
    world.expect(0, &["shell", &run, "--", "test", "-e", "/etc/apt/apt.conf.d/99x"]);
    let cached = ["shell", &run, "--", "find", "/var/cache/apt/archives", "-name", "tree_*.deb"];
    let (printed, error) = world.expect(0, &cached);
    assert!(printed.contains("/tree_"), "{printed}{error}");
    let (printed, error) = world.expect(100, &["shell", "--rerun", &run]);
    assert!(printed.contains("the script ran"), "{printed}{error}");
    assert!(error.contains("a step of the plan for ") && error.contains("apt-get"), "{error}");
    world.expect(0, &["shell", &run, "--", "touch", "/etc/repaired"]);
    let (printed, error) = world.expect(0, &["shell", "--rerun", &run]);
    assert!(printed.contains("the script ran"), "{printed}{error}");
    world.expect(0, &["shell", &run, "--", "test", "-e", "/usr/bin/tree"]);
    world.assert_no_traces("after the step ran again");
}

/// A step that downloads runs again with the settings of the definition's project, not of the working directory.
#[test]
fn a_step_runs_again_with_the_network_settings_of_its_project() {
    let world = small();
    // No proxy listens on this port. The failure shows that the step uses the proxy.
    world.write("oven.toml", "[network]\nproxy = \"http://127.0.0.1:9\"\n");
    world.write("image/image.toml", "from = { name = \"small\" }\npackages = [\"tree\"]\n");
    let output = world.oven(&["bake", FLAG, "image"]);
    let error = stderr(&output);
    assert!(!output.status.success() && error.contains("127.0.0.1"), "{error}");
    let run = run_of(&error);
    let elsewhere = tempfile::tempdir().unwrap();
    let rerun = || {
        let output =
            world.command(&["shell", "--rerun", &run]).current_dir(elsewhere.path()).output().unwrap();
        (out(&output), stderr(&output))
    };
    let (printed, error) = rerun();
    assert!(printed.contains("127.0.0.1") && !error.contains("[network]"), "{printed}{error}");
    world.write("oven.toml", "[network]\nproxy = 1\n");
    let (printed, error) = rerun();
    assert!(!printed.contains("127.0.0.1"), "{printed}{error}");
    assert!(error.contains("does not get the settings of [network]"), "{error}");
    world.assert_no_traces("after the step ran again");
}
