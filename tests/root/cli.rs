//! The program as an operator and a script meet it: terminals, signals, streams, what is swept and what is not.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven_testing::{LocalWorld, pause, stderr, until};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Within which a stopped bake has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);
/// For what a busy machine may take to come to a point.
const PATIENCE: Duration = Duration::from_secs(60);

/// A region with a small Debian as `small`, and the definition `image` on it, which runs a script.
fn world(script: &str) -> LocalWorld {
    let world = LocalWorld::empty();
    let base = std::env::var("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    world.expect(0, &["import", &base, "--name", "small"]);
    define(&world, "image", script);
    world
}

fn define(world: &LocalWorld, name: &str, script: &str) {
    let toml = "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\n";
    world.write(&format!("{name}/image.toml"), toml);
    world.write(&format!("{name}/s.sh"), &format!("#!/bin/sh\n# {name}\n{script}\n"));
}

/// Holds scripts at work until they are let go: each waits for the end of a connection.
struct Gate(TcpListener);

impl Gate {
    fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    /// A definition whose script says something, and then waits.
    fn define(&self, world: &LocalWorld, name: &str, said: &str) {
        let port = self.0.local_addr().unwrap().port();
        let toml = "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\nnetwork = true\n";
        world.write(&format!("{name}/image.toml"), toml);
        let script = format!("#!/bin/bash\necho {said}\nread nothing < /dev/tcp/127.0.0.1/{port}\nexit 0\n");
        world.write(&format!("{name}/s.sh"), &script);
    }

    /// Lets one go, once it waits.
    fn open(&self) {
        drop(self.0.accept().unwrap());
    }

    /// Lets all go that come, until the test's process ends.
    fn stays_open(self) {
        std::thread::spawn(move || self.0.incoming().for_each(drop));
    }
}

/// `oven` on a terminal of its own.
struct Terminal {
    script: Child,
    seen: String,
    output: std::process::ChildStdout,
}

impl Terminal {
    fn open(world: &LocalWorld, env: &[(&str, &str)], args: &str) -> Self {
        let oven = format!("{} --region-dir {} {args}", env!("CARGO_BIN_EXE_oven"), world.region().display());
        let mut command = Command::new("script");
        command.args(["-qefc", &oven, "/dev/null"]).current_dir(world.dir.path());
        command.env("TERM", "xterm").env_remove("NO_COLOR").envs(env.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut script = command.spawn().expect("script, of bsdutils or util-linux");
        let output = script.stdout.take().unwrap();
        Self { script, seen: String::new(), output }
    }

    /// Reads until this was shown.
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", self.seen);
            let mut buffer = [0; 4096];
            let length = self.output.read(&mut buffer).unwrap();
            assert!(length > 0, "no {text:?} in {:?}", self.seen);
            self.seen += &String::from_utf8_lossy(&buffer[..length]);
        }
    }

    fn type_in(&mut self, keys: &str) {
        self.script.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// The exit code, and all that was shown.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).unwrap();
        let code = self.script.wait().unwrap().code();
        (code, self.seen + &String::from_utf8_lossy(&rest))
    }
}

fn assert_nothing_left(world: &LocalWorld, what: &str) {
    world.assert_no_traces(what);
    let files = world.files();
    assert!(!files.iter().any(|file| file.starts_with("volumes/")), "{what}: {files:?}");
}

#[test]
fn a_terminal_shows_what_is_under_way() {
    let (world, gate) = (world("true"), Gate::new());
    gate.define(&world, "image", "at work");
    let mut terminal = Terminal::open(&world, &[], "bake --force image");
    terminal.wait_for(" s  \x1b[2mat work\x1b[0m");
    gate.open();
    let (code, seen) = terminal.end();
    assert_eq!(code, Some(0), "{seen}");
    assert!(counts(&seen, "  … running s.sh  ", " s  \x1b[2mat work\x1b[0m"), "{seen:?}");
    assert!(seen.contains("\r\x1b[2K  \x1b[32m✓\x1b[0m running s.sh"), "{seen:?}");

    let mut terminal = Terminal::open(&world, &[("NO_COLOR", "1")], "bake --force image");
    terminal.wait_for(" s  at work");
    gate.open();
    let (_, seen) = terminal.end();
    assert!(counts(&seen, "… running s.sh  ", " s  at work") && !seen.contains("\x1b[3"), "{seen:?}");
    gate.stays_open();
    let (_, seen) = Terminal::open(&world, &[("TERM", "dumb")], "bake --force image").end();
    assert!(counts(&seen, "running s.sh (", " s)") && !seen.contains('\x1b'), "{seen:?}");
    let (_, err) = world.expect(0, &["bake", "--force", "image"]);
    assert!(counts(&err, "running s.sh (", " s)"), "{err}");
    assert!(!err.contains('\x1b') && !err.contains("at work"), "{err}");
    let (_, err) = world.expect(0, &["-v", "bake", "--force", "image"]);
    assert!(err.contains("    at work\n"), "{err}");
    let (out, err) = world.expect(0, &["-q", "bake", "--force", "image"]);
    assert!(out.starts_with("ami-") && err.is_empty(), "{out}{err}");
}

/// Whether there is a number of seconds, whichever, between the two.
fn counts(text: &str, before: &str, after: &str) -> bool {
    text.split(before).skip(1).any(|rest| {
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        rest.starts_with(after)
    })
}

#[test]
fn ctrl_c_and_a_closed_terminal_clean_up() {
    let world = world("sleep 100");
    let mut terminal = Terminal::open(&world, &[], "bake image");
    terminal.wait_for("running s.sh");
    let start = Instant::now();
    terminal.type_in("\x03");
    let (code, seen) = terminal.end();
    assert!(start.elapsed() < STOP);
    assert_eq!(code, Some(130), "{seen}");
    assert!(seen.contains("stopping and cleaning up") && seen.contains("nothing was left behind"), "{seen}");
    assert_nothing_left(&world, "Ctrl-C");

    let mut terminal = Terminal::open(&world, &[], "bake image");
    terminal.wait_for("running s.sh");
    terminal.script.kill().unwrap();
    terminal.end();
    let start = Instant::now();
    while !world.traces().is_empty() {
        assert!(start.elapsed() < STOP, "{:?}", world.traces());
        pause(Duration::from_millis(50));
    }
    assert_nothing_left(&world, "the terminal was closed");

    // At once: what is left is swept.
    let mut terminal = Terminal::open(&world, &[], "bake image");
    terminal.wait_for("running s.sh");
    terminal.type_in("\x03\x03");
    let (code, seen) = terminal.end();
    assert_eq!(code, Some(130), "{seen}");
    world.assert_no_traces("Ctrl-C twice");
    world.expect(0, &["sweep"]);
    assert_nothing_left(&world, "Ctrl-C twice, and swept");
}

#[test]
fn a_stop_of_several_bakes_is_reported_once() {
    let world = world("echo begun; sleep 100");
    define(&world, "other", "echo begun; sleep 100");
    define(&world, "third", "echo begun; sleep 100");
    let mut command = world.command(&["--json", "bake", "--jobs", "2", "image", "other", "third"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let logs = || std::fs::read_dir(world.region().join("logs")).into_iter().flatten().flatten();
    let begun =
        || logs().filter(|log| std::fs::read_to_string(log.path()).is_ok_and(|log| log.contains("begun")));
    until("two scripts", || (begun().count() == 2).then_some(()));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let start = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(start.elapsed() < STOP);
    assert_eq!(output.status.code(), Some(130));
    let result = result(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(result["exit_code"], 130);
    assert!(result["images"].as_array().unwrap().iter().all(|i| i["kind"] == "interrupted"), "{result}");
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    assert_nothing_left(&world, "SIGTERM");
}

fn wait_for_volumes(world: &LocalWorld, number: usize) {
    let start = Instant::now();
    while world.loops().len() < number {
        assert!(start.elapsed() < PATIENCE, "{:?}", world.loops());
        pause(Duration::from_millis(20));
    }
}

fn wait_for_process(arguments: &[&str]) {
    let (start, wanted) = (Instant::now(), arguments.join("\0") + "\0");
    let runs = |process: std::io::Result<std::fs::DirEntry>| {
        let its = std::fs::read(process.unwrap().path().join("cmdline"));
        its.is_ok_and(|its| its == wanted.as_bytes())
    };
    while !std::fs::read_dir("/proc").unwrap().any(runs) {
        assert!(start.elapsed() < PATIENCE, "{arguments:?} does not run");
        pause(Duration::from_millis(20));
    }
}

/// The last object of a JSON stream; every line has to be one that the schema knows.
fn result(stream: &str) -> Value {
    let objects = stream.lines().map(|line| serde_json::from_str(line).expect(line));
    let mut objects: Vec<Value> = objects.collect();
    let (mut schemas, schema) =
        (boon::Schemas::new(), concat!(env!("CARGO_MANIFEST_DIR"), "/schema/events.schema.json"));
    let schema = boon::Compiler::new().compile(schema, &mut schemas).expect("a schema");
    for object in &objects {
        schemas.validate(object, schema).unwrap_or_else(|error| panic!("{object}: {error:#}"));
    }
    let last = objects.pop().expect("a result");
    assert_eq!(last["event"], "result", "{stream}");
    last
}

#[test]
fn a_json_stream_ends_with_a_result_whatever_happens() {
    let world = world("exit 0");
    define(&world, "broken", "echo the reason; exit 3");
    world.write("wrong/image.toml", "frm = 1\n");
    let (out, _) = world.expect(0, &["--json", "bake", "image"]);
    let baked = result(&out)["images"][0].clone();
    assert_eq!((&baked["outcome"], baked["log"].is_string()), (&Value::from("baked"), true), "{baked}");
    let (out, _) = world.expect(0, &["--json", "bake", "image"]);
    let found = result(&out)["images"][0].clone();
    assert_eq!(found["outcome"], "already-baked");
    assert_eq!((&found["ami_id"], &found["log"]), (&baked["ami_id"], &Value::Null), "{found}");

    let (out, err) = world.expect(5, &["--json", "bake", "broken"]);
    let failed = result(&out);
    assert_eq!((&failed["exit_code"], &failed["images"][0]["kind"]), (&Value::from(5), &Value::from("step")));
    assert!(failed["images"][0]["error"].as_str().unwrap().contains("the reason"), "{failed}");
    assert_eq!(err, "", "all of it is in the stream");
    let (out, _) = world.expect(3, &["--json", "bake", "wrong"]);
    assert_eq!(
        (&result(&out)["exit_code"], &result(&out)["error"]["kind"]),
        (&3.into(), &"definition".into())
    );
    for args in [vec!["doctor"], vec!["sweep"], vec!["images", "list"], vec!["plan", "image"]] {
        let (out, _) = world.expect(0, &[&["--json"], &args[..]].concat());
        assert_eq!(result(&out)["exit_code"], 0, "{args:?}");
    }
}

#[test]
fn a_hit_leaves_no_log_and_a_failure_no_id() {
    let world = world("exit 0");
    world.expect(0, &["bake", "image"]);
    let id = world.path("image/.ami_id.json");
    assert!(id.exists());
    let logs = || std::fs::read_dir(world.region().join("logs")).unwrap().count();
    assert_eq!(logs(), 1);
    world.expect(0, &["bake", "image"]);
    assert_eq!(logs(), 1);
    define(&world, "image", "exit 1");
    world.expect(5, &["bake", "image"]);
    assert!(!id.exists(), "it names an older image");
    define(&world, "image", "exit 0");
    world.expect(0, &["bake", "image"]);
    world.write("image/image.toml", "frm = 1\n");
    world.expect(3, &["bake", "image"]);
    assert!(!id.exists(), "it names an older image");

    // The image is what matters.
    define(&world, "image", "exit 0");
    world.write("image/.ami_id.json/in-the-way", "");
    let (out, err) = world.expect(0, &["bake", "image"]);
    assert!(out.starts_with("ami-") && err.contains("warning: writing image/.ami_id.json"), "{err}");
}

#[test]
fn a_file_can_be_owned_by_an_account_that_a_script_creates() {
    let world = world("exit 0");
    let script = "#!/bin/sh\nset -e\ntest ! -e /home/app/x\ntest -e /etc/early\n\
                  echo app:x:1234:1235::/home/app:/bin/sh >> /etc/passwd\necho app:x:1235: >> /etc/group\n\
                  echo script > /etc/replaced\n";
    world.write("image/s.sh", script);
    world.write(
        "image/t.sh",
        "#!/bin/sh\nset -e\nls -ln /home/app/x | grep ' 1234 .*1235 '\ngrep new /etc/replaced\n",
    );
    world.write("image/x", "new\n");
    let file = |more: &str| format!("[[file]]\nsource = \"x\"\n{more}\n");
    let owned = "target = \"/home/app/x\"\nowner = \"app\"\ngroup = \"app\"\n";
    let others =
        [file("target = \"/etc/early\""), file("target = \"/etc/replaced\"\nafter = \"run\"")].concat();
    let programs = "[[run]]\nscript = \"s.sh\"\n[[test]]\nscript = \"t.sh\"\n";
    let toml = |after: &str| {
        format!("from = {{ name = \"small\" }}\n{others}{}{programs}", file(&(owned.to_owned() + after)))
    };
    world.write("image/image.toml", &toml(""));
    let (_, err) = world.expect(3, &["bake", "image"]);
    let place = "image/image.toml:12: `owner` of [[file]]: the image has no user `app`";
    assert!(err.contains(place) && err.contains("set `after = \"run\"` in this [[file]]"), "{err}");
    world.write("image/image.toml", &toml("after = \"run\""));
    world.expect(0, &["bake", "image"]);
}

#[test]
fn links_out_of_a_definition_work_with_the_inputs_that_plan_names() {
    use std::os::unix::fs::symlink;
    let world = world("set -e\ngrep -x shared conf\ngrep -x shared roles/conf\ngrep -x deep files/deep");
    world.write("shared-x/conf", "shared\n");
    world.write("shared-x/sub/deep", "deep\n");
    world.write("image/files/x", "");
    for (link, target) in
        [("conf", "../shared-x/conf"), ("roles", "../shared-x"), ("files/deep", "../../shared-x/sub/deep")]
    {
        symlink(target, world.path("image").join(link)).unwrap();
    }
    let (_, err) = world.expect(0, &["plan", "image"]);
    let inputs = "inputs = [\"../shared-x\"]";
    assert!(err.contains("image/image.toml:1: `inputs` is not set") && err.contains(inputs), "{err}");
    world.write("child/image.toml", "from = \"../image\"\n");
    let (_, err) = world.expect(0, &["plan", "child"]);
    assert!(err.contains(inputs), "{err}");
    let (_, err) = world.expect(5, &["bake", "image"]);
    assert!(err.contains(inputs), "{err}");
    let toml = std::fs::read_to_string(world.path("image/image.toml")).unwrap();
    world.write("image/image.toml", &format!("{inputs}\n{toml}"));
    let (_, err) = world.expect(0, &["bake", "image"]);
    assert!(!err.contains("cannot follow these links"), "{err}");
    // The image has a file at this path, too.
    symlink(world.path("shared-x"), world.path("image/absolute")).unwrap();
    for verb in ["plan", "bake"] {
        let (_, err) = world.expect(3, &[verb, "image"]);
        assert!(err.contains("image/absolute: is a link to the absolute path"), "{err}");
    }
}

#[test]
fn a_directory_whose_name_is_not_utf8_can_be_baked() {
    use std::os::unix::ffi::OsStrExt;
    let world = world("exit 0");
    let dir = std::ffi::OsStr::from_bytes(b"w\xffeb");
    std::fs::rename(world.path("image"), world.path(".").join(dir)).unwrap();
    let toml = "name = \"image\"\nfrom = { name = \"small\" }\n";
    std::fs::write(world.path(".").join(dir).join("image.toml"), toml).unwrap();
    for verb in ["plan", "bake", "plan", "bake"] {
        let output = world.command(&["--json", verb]).arg(dir).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{verb}: {out}{err}");
        assert_eq!(result(&out)["images"][0]["definition"], "w\u{fffd}eb", "{verb}");
    }
}

#[test]
fn a_bake_whose_result_cannot_be_written_fails() {
    let world = world("exit 0");
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    for args in
        [&["bake", "image"][..], &["bake", "image"], &["images", "list"], &["--json", "bake", "image"]]
    {
        let output = world.command(args).stdout(full()).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(8), "{args:?}: {err}");
        assert!(
            err.contains("error: standard output cannot be written: No space left on device"),
            "{args:?}: {err}"
        );
    }
    // The image exists, and the next bake prints its id.
    let (out, err) = world.expect(0, &["bake", "image"]);
    assert!(out.starts_with("ami-") && err.contains("already baked"), "{err}");
}

#[test]
fn only_a_bake_that_began_or_a_wrong_definition_loses_its_id() {
    let world = world("exit 0");
    define(&world, "broken", "exit 3");
    world.write("child/image.toml", "from = \"../broken\"\n");
    world.write("wrong/image.toml", "frm = 1\n");
    world.write("of-wrong/image.toml", "from = \"../wrong\"\n");
    world.write("again/image.toml", "name = \"image\"\nfrom = { name = \"small\" }\n");
    let secret = "name = \"needs\"\nfrom = { name = \"small\" }\n[[run]]\ncommand = [\"true\"]\nsecrets = [\"UNSET_TOKEN\"]\n";
    world.write("needs/image.toml", secret);
    world.write("of-needs/image.toml", "from = \"../needs\"\n");
    let names = ["image", "broken", "child", "wrong", "of-wrong", "again", "needs", "of-needs"];
    let old = "{\"ami_id\": \"ami-old\"}\n";
    let cases: [(i32, &[&str], &[&str]); 11] = [
        // A name that is not a definition.
        (3, &["image", "imagee"], &[]),
        // A definition with a mistake, and a parent with a mistake.
        (3, &["image", "wrong"], &["wrong"]),
        (3, &["image", "of-wrong"], &["wrong"]),
        // Two definitions that are right, but cannot be baked together.
        (3, &["image", "again"], &[]),
        // A command line that is wrong.
        (2, &["image", "--var", "gone=1"], &[]),
        (2, &["image", "--verify"], &[]),
        // A bake that failed, and a child that was skipped.
        (5, &["child", "broken"], &["broken"]),
        // A secret that is not permitted, and the same secret that is not set.
        (3, &["image", "needs", "--secret", "OTHER"], &["needs"]),
        (3, &["image", "of-needs", "--secret", "OTHER"], &["needs"]),
        (3, &["needs"], &["needs"]),
        (3, &["of-needs", "needs", "--secret", "UNSET_TOKEN"], &["needs"]),
    ];
    for (code, args, lost) in cases {
        names.iter().for_each(|name| world.write(&format!("{name}/.ami_id.json"), old));
        world.expect(code, &[&["bake"], args].concat());
        for name in names {
            let path = world.path(&format!("{name}/.ami_id.json"));
            let expected = (!lost.contains(&name)).then(|| old.to_owned());
            assert_eq!(std::fs::read_to_string(path).ok(), expected, "{args:?}: {name}");
        }
    }
}

#[test]
fn a_failed_bake_does_not_stop_the_others() {
    let world = world("exit 0");
    define(&world, "broken", "exit 3");
    world.write("child/image.toml", "from = \"../broken\"\n");
    let (out, err) = world.expect(5, &["bake", "broken", "child", "image"]);
    assert!(out.starts_with("ami-") && out.ends_with("\timage\n"), "{out}");
    let summary: Vec<Vec<&str>> =
        err.lines().rev().take(3).map(|line| line.split_whitespace().take(2).collect()).collect();
    assert_eq!(summary, [["image", "baked"], ["child", "skipped"], ["broken", "failed"]], "{err}");
    assert!(err.contains("its parent broken has no image"), "{err}");
    assert_nothing_left(&world, "one failed");
}

#[test]
fn an_active_run_is_not_swept() {
    let (world, gate) = (world("true"), Gate::new());
    gate.define(&world, "image", "at work");
    let mut child =
        world.command(&["bake", "image"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_volumes(&world, 1);
    let file = world.files().into_iter().find(|f| f.starts_with("volumes/") && f.ends_with(".json")).unwrap();
    let record: Value = serde_json::from_slice(&std::fs::read(world.region().join(file)).unwrap()).unwrap();
    let run = record["tags"]["oven:run"].as_str().unwrap();
    for args in [&["sweep", "--run", run][..], &["sweep", "--kept", "--run", &run[..8]]] {
        let (_, err) = world.expect(4, args);
        assert!(err.contains("it may still be active"), "{err}");
    }
    let (out, err) = world.expect(0, &["sweep", "--older-than", "0s"]);
    assert!(out.is_empty() && err.contains("there are no leftovers of ended runs"), "{out}{err}");
    gate.stays_open();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_shell_on_a_terminal() {
    let world = world("exit 0");
    let (out, _) = world.expect(0, &["images", "list"]);
    let ami = out.split_whitespace().next().unwrap().to_owned();
    let mut terminal = Terminal::open(&world, &[], &format!("shell {ami}"));
    terminal.wait_for("# ");
    // Nobody else's.
    let time = format!("9{}", std::process::id());
    terminal.type_in(&format!("sleep {time}\r"));
    wait_for_process(&["sleep", &time]);
    // Meant for what runs in there.
    terminal.type_in("\x03");
    terminal.type_in("echo a$((1 + 1))c; exit 7\r");
    terminal.wait_for("a2c");
    let (code, seen) = terminal.end();
    assert_eq!(code, Some(7), "{seen}");
    assert!(!seen.contains("stopping"), "{seen}");
    assert_nothing_left(&world, "the shell");
}

#[test]
fn what_is_no_disk_is_not_imported_and_what_was_is_removed() {
    let world = LocalWorld::tiny();
    for (name, content, word) in [
        ("text", &b"not a disk\n"[..], "is not a disk"),
        ("zeros", &[0; 1 << 20], "is not a disk"),
        ("packed", b"\x1f\x8b\x08\0", "gzip -dc"),
        ("empty", b"", "empty"),
    ] {
        std::fs::write(world.path(name), content).unwrap();
        let (_, err) = world.expect(2, &["import", name, "--name", "other"]);
        assert!(err.contains(word), "{name}: {err}");
    }
    let (out, _) = world.expect(0, &["images", "list", "tiny"]);
    let ami = out.split_whitespace().next().unwrap().to_owned();
    world.expect(4, &["images", "remove", &ami, "ami-0123456789abcdef0"]);
    let (out, _) = world.expect(0, &["images", "remove", &ami]);
    assert!(out.starts_with(&format!("removed {ami} (tiny)")), "{out}");
    let files = world.files();
    assert!(!files.iter().any(|f| f.starts_with("images/") || f.starts_with("snapshots/")), "{files:?}");
}

#[test]
fn doctor_tries_and_names_what_is_missing() {
    let fresh = LocalWorld::empty();
    for args in [&["doctor"][..], &["doctor", "--disks", "direct"]] {
        let (out, _) = fresh.expect(0, args);
        assert!(out.contains("ok     a contained step\n"), "{out}");
        assert!(out.contains("ok     a disk in the region\n"), "{out}");
        assert!(out.contains("there is no region yet, and `oven import RAW --name NAME` makes it"), "{out}");
        assert!(!fresh.region().exists(), "only an import makes a region");
    }
    let world = LocalWorld::tiny();
    for args in [&["doctor"][..], &["doctor", "--disks", "direct"]] {
        let (out, _) = world.expect(0, args);
        assert!(out.contains("ok     a disk in the region\n"), "{out}");
        assert!(!out.contains("there is no region"), "{out}");
        assert_nothing_left(&world, "doctor");
    }
    let doctor = world.command(&["doctor"]);
    let mut weak = Command::new("setpriv");
    weak.arg("--bounding-set=-mknod,-net_admin").arg(doctor.get_program()).args(doctor.get_args());
    let output = weak.output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(8), "{out}");
    assert!(out.contains("lacks  capabilities: NET_ADMIN, MKNOD are missing"), "{out}");
}
