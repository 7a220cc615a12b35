//! A plugin with a planted fault of each kind fails the check with the reason, and does no harm meanwhile.

use super::{example, plugin, result, tiny};
use oven_testing::LocalWorld;
use serde_json::Value;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

const CLAIM: &str = r#"(if .os_release.ID == "tiny" then "exact" else "no" end)"#;
const TIMEOUT: &str = "timeout: 600";

/// The smallest plugin with this fault in its jq program, or before it.
fn with(world: &LocalWorld, name: &str, fault: &Fault) -> String {
    let text = fs::read_to_string(example("tiny.sh")).unwrap();
    let text = match fault {
        Fault::First(lines) => text.replacen("exec jq", &format!("{lines}\nexec jq"), 1),
        Fault::Instead(lines) => format!("#!/bin/sh\n{lines}\n"),
        Fault::Jq(good, bad) => replaced(&text, good, bad),
        Fault::Careless(good, bad) => {
            let checked = r#"or (.name | test("\\A[a-z0-9][a-z0-9.+-]*\\z") | not)"#;
            replaced(&replaced(&text, checked, "or .name == \"\""), good, bad)
        }
    };
    // Other runs of this test have sleepers of their own.
    let text = text.replace("sleep 8639", &format!("sleep 1{}", std::process::id()));
    plugin(world, &format!("{name}.sh"), &text).to_str().unwrap().to_owned()
}

enum Fault {
    /// Before it does its work.
    First(&'static str),
    /// Instead of it.
    Instead(&'static str),
    /// This of its program replaced by that.
    Jq(&'static str, &'static str),
    /// The same, and whatever is called a name is one.
    Careless(&'static str, &'static str),
}

fn replaced(text: &str, good: &str, bad: &str) -> String {
    assert!(text.contains(good), "{good}");
    text.replace(good, bad)
}

/// The rules that it breaks, and the messages.
fn faults(world: &LocalWorld, path: &str) -> Vec<(String, String)> {
    let golden = example("tiny.golden");
    let mut command = world.command(&["--json", "plugin", "check", "--golden", &golden, path]);
    // What a plugin must not see.
    let output = command.env("OVEN_TEST_SECRET", "hunter2").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{path}: {text}");
    assert!(!text.contains("hunter2"), "{text}");
    let of = |rule: &Value| -> Vec<(String, String)> {
        let faults = rule["faults"].as_array().unwrap().iter();
        faults
            .map(|fault| (rule["rule"].as_str().unwrap().to_owned(), fault.as_str().unwrap().to_owned()))
            .collect()
    };
    result(&text)["rules"].as_array().unwrap().iter().flat_map(of).collect()
}

const ANSWERS: &str = "it answers every request";
const SOUND: &str = "answers are valid";

#[test]
fn each_fails_with_the_reason() {
    let world = tiny();
    let table = [
        (
            "random",
            Fault::Jq("\"installing packages\"", "\"installing \\(now)\""),
            "the same request",
            "plan.steps[0].why",
        ),
        ("field", Fault::Jq(TIMEOUT, "timeout: 600, time_out: 1"), ANSWERS, "unknown field `time_out`"),
        (
            "path",
            Fault::Jq("[\"/bin/pkg\", \"add\"]", "[\"/../bin/pkg\", \"add\"]"),
            SOUND,
            "is not normalized",
        ),
        (
            "relative",
            Fault::Jq("claim: (", "look_for: [\"etc/pkg.conf\"], claim: ("),
            SOUND,
            "is not absolute",
        ),
        ("network", Fault::Jq(TIMEOUT, "timeout: 600, network: true"), SOUND, "does not set `network`"),
        ("forever", Fault::Jq(TIMEOUT, "timeout: 0"), SOUND, "timeout: 0 seconds"),
        ("nameless", Fault::Jq("\"installing packages\"", "\"\""), SOUND, "why is empty"),
        ("everything", Fault::Jq(CLAIM, "\"exact\""), "it does not claim unknown systems", "an unknown ID"),
        (
            "lenient",
            Fault::Jq("(keys - [\"api\", if", "(keys - [\"oven_check\", \"api\", if"),
            "unknown fields",
            "an unknown field",
        ),
        ("later", Fault::Jq(".api != 1", ".api > 2"), "unknown fields", "a later version"),
        (
            "forgets",
            Fault::Jq("del(.name) !=", "del(.name, .version) !="),
            "it ignores nothing that a job asks for",
            "a version",
        ),
        (
            "toolless",
            Fault::Jq(".packages, .tools,", ".packages,"),
            "it ignores nothing that a job asks for",
            "a tool for the bake is refused",
        ),
        (
            "useless",
            Fault::Jq(TIMEOUT, "timeout: 600, before_retry: [\"pkg\"]"),
            SOUND,
            "before_retry would never run",
        ),
        (
            "shell",
            Fault::Careless(
                "([\"/bin/pkg\", \"add\"] + $names)",
                "[\"sh\", \"-c\", \"pkg add \\($names | join(\" \"))\"]",
            ),
            "names of packages do not become",
            "part of a script for sh",
        ),
        (
            "option",
            Fault::Careless("\"installing packages\"", "\"installing them\""),
            "names of packages do not become",
            "would read it as an option",
        ),
        (
            "unproven",
            Fault::Jq("expect: {packages: [$names[] | {name: .}]},", ""),
            "it claims a system",
            "nothing verifies afterwards",
        ),
        ("garbage", Fault::Instead("echo hello"), ANSWERS, "does not follow the contract"),
        ("nothing", Fault::Instead(":"), ANSWERS, "is empty"),
        ("huge", Fault::Instead("yes"), ANSWERS, "more than 4 MiB"),
        ("crash", Fault::Instead("kill -SEGV $$"), ANSWERS, "killed by SIGSEGV"),
        (
            "code",
            Fault::Instead("echo the moon is wrong >&2; exit 3"),
            ANSWERS,
            "exit status 3; standard error: the moon is wrong",
        ),
        (
            "words",
            Fault::First("echo by the way >&2"),
            ANSWERS,
            "wrote to standard error; standard error: by the way",
        ),
        ("daemon", Fault::First("sleep 86399 >/dev/null 2>&1 &"), ANSWERS, "left processes running: sleep"),
        (
            "hidden",
            // It goes on when the other one is there.
            Fault::First(
                "mkfifo /tmp/up; setsid sh -c 'echo > /tmp/up; sleep 86399 & sleep 86399' >/dev/null 2>&1 & \
                 read nothing < /tmp/up",
            ),
            ANSWERS,
            "left processes running: ",
        ),
        ("reads", Fault::First("cat /etc/shadow || exit 1"), ANSWERS, "/etc/shadow: Permission denied"),
        (
            "looks",
            Fault::First("echo \"$OVEN_TEST_SECRET${OVEN_TEST_SECRET:?}\" >&2"),
            ANSWERS,
            "OVEN_TEST_SECRET: parameter not set",
        ),
        ("writes", Fault::First("echo x > /var/tmp/oven-test || exit 1"), ANSWERS, "Read-only file system"),
        (
            "asks",
            Fault::First("bash -c 'exec 3<>/dev/tcp/192.0.2.1/80' || exit 1"),
            ANSWERS,
            "Network is unreachable",
        ),
    ];
    for (name, fault, rule, words) in table {
        let path = with(&world, name, &fault);
        let found = faults(&world, &path);
        let hit = found.iter().any(|(broken, told)| broken.starts_with(rule) && told.contains(words));
        assert!(hit, "{name}: {rule}: {words}: {found:#?}");
    }
    nobody_sleeps(9);
    assert!(!std::path::Path::new("/var/tmp/oven-test").exists());
}

#[test]
fn what_is_no_program_says_so() {
    let world = LocalWorld::empty();
    for (name, text, words) in [
        ("binary", "\u{1}\u{2}", "neither a program nor a script that begins with `#!`"),
        ("interpreter", "#!/usr/bin/no-such\n", "names a program that does not exist"),
    ] {
        let path = plugin(&world, name, text);
        let (out, _) = world.expect(3, &["plugin", "check", path.to_str().unwrap()]);
        assert!(out.contains(words), "{name}: {out}");
    }
}

#[test]
fn one_that_hangs_is_killed_and_its_disk_is_released() {
    let world = tiny();
    let path =
        with(&world, "hangs", &Fault::Instead("[ $1 = claims ] && exec sleep 86398\nexec sleep 86398"));
    let started = Instant::now();
    let (out, _) = world.expect(3, &["plugin", "check", &path]);
    assert!(out.contains("longer than 8 s and was killed") && out.contains("untried"), "{out}");
    assert!(started.elapsed() < Duration::from_secs(60), "it is given up: {:?}", started.elapsed());

    let hangs = "[ $1 = plan ] && exec sleep 86398";
    let path = with(&world, "later", &Fault::First(hangs));
    let (_, err) = world.expect(8, &["--plugin", &path, "bake", "image"]);
    assert!(
        err.contains(&format!("asking the plugin {path} for its plan: it took longer than 8 s")),
        "{err}"
    );
    assert!(err.contains("oven plugin check"), "{err}");
    world.assert_no_traces("a bake whose plugin hangs");
    nobody_sleeps(8);
}

/// An invalid answer is not executed.
#[test]
fn a_bake_believes_nothing_that_the_check_refuses() {
    let world = tiny();
    world.write("image/image.toml", "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"hello\"]\n");
    for (name, fault, words) in [
        (
            "network",
            Fault::Jq(TIMEOUT, "timeout: 600, network: true"),
            "steps[0]: a step of phase install has `network`",
        ),
        ("path", Fault::Jq("[\"/bin/pkg\", \"add\"]", "[\"../pkg\", \"add\"]"), "is not absolute"),
        ("field", Fault::Jq(TIMEOUT, "timeout: 600, time_out: 1"), "unknown field `time_out`"),
        ("daemon", Fault::First("sleep 86397 >/dev/null 2>&1 &"), "left processes running: sleep"),
        ("fails", Fault::Instead("echo no moon >&2; exit 3"), "standard error: no moon"),
    ] {
        let path = with(&world, name, &fault);
        let (_, err) = world.expect(8, &["--plugin", &path, "bake", "image"]);
        assert!(err.contains(words) && err.contains(&path), "{name}: {err}");
    }
    world.assert_no_traces("bakes whose plugins are wrong");
}

/// What a plugin sees, as the reason with which it refuses.
#[test]
fn it_runs_as_nobody_and_stores_nothing() {
    let world = LocalWorld::empty();
    let spy = r#"#!/bin/sh
if [ "$1" = claims ]; then echo '{"api":1,"claim":"exact"}'; exit; fi
echo once >> /tmp/state
told="id=$(id -u):$(id -g):$(id -G) cwd=$(pwd) names=$(env | cut -d= -f1 | sort | tr '\n' ',') times=$(grep -c once /tmp/state) processes=$(ls /proc | grep -c '^[0-9]') links=$(grep -c : /proc/net/dev) run=$(ls /run) tmp=$(ls /tmp) caps=$(grep CapEff /proc/self/status | tr -d '\t') sub=$(unshare -U true 2>/dev/null && echo yes || echo no)"
echo "{\"api\":1,\"refused\":\"$told\"}"
"#;
    let path = plugin(&world, "spy.sh", spy);
    world.write("os", "ID=spied\n");
    for _ in 0..2 {
        let (_, err) = world.expect(3, &["--plugin", path.to_str().unwrap(), "plan", "--os-release", "os"]);
        for words in [
            "id=65534:65534:65534 ",
            "cwd=/ ",
            "names=HOME,LC_ALL,PATH,",
            "times=1 ",
            "links=1 ",
            "run=oven-plugin ",
            "tmp=state ",
            "caps=CapEff:0000000000000000 ",
            "sub=no",
        ] {
            assert!(err.contains(words), "{words}: {err}");
        }
        let processes =
            err.split("processes=").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
        assert!(processes.is_some_and(|processes| processes < 8), "{err}");
    }
}

fn nobody_sleeps(which: u32) {
    let pattern = format!("^sleep 1{}{which}$", std::process::id());
    let processes = Command::new("pgrep").args(["-f", &pattern]).output().unwrap();
    assert_eq!(
        processes.status.code(),
        Some(1),
        "somebody lives: {}",
        String::from_utf8_lossy(&processes.stdout)
    );
}
