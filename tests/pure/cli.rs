//! The program as a user meets it, without root: mistakes, help, plans, checksums.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn oven(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    command.env_clear().env("OVEN_REGION_DIR", "region").current_dir(dir).args(args);
    command.output().unwrap()
}

fn expect(dir: &Path, code: i32, args: &[&str]) -> (String, String) {
    let output = oven(dir, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "oven {args:?}\n{out}\n{err}");
    (out, err)
}

fn definition(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("web")).unwrap();
    std::fs::write(dir.path().join("web/image.toml"), text).unwrap();
    dir
}

#[test]
fn mistakes_name_file_line_and_key() {
    let base = "from = { name = \"b\" }\n";
    let cases = [
        ("packges = []", vec!["web/image.toml:2", "packges", "packages"]),
        ("[[file]]\nsource = \"gone\"\ntarget = \"/x\"", vec!["web/image.toml:3", "source", "gone"]),
        ("[[file]]\nsource = \"image.toml\"\ntarget = \"x\"", vec!["web/image.toml:4", "target"]),
        ("packages = [\"nginx=\"]", vec!["web/image.toml:2", "nginx="]),
        ("packages = [\"./gone_1_all.deb\"]", vec!["web/image.toml:2", "gone_1_all.deb"]),
        ("upgrade = 1", vec!["web/image.toml:2", "upgrade"]),
        ("name = \"a", vec!["web/image.toml:2"]),
        ("[disk]\nsize_gib = 0", vec!["web/image.toml:3", "size_gib"]),
        ("[tags]\n\"oven:run\" = \"x\"", vec!["web/image.toml:3", "oven:run"]),
    ];
    for (mistake, wanted) in cases {
        let dir = definition(&format!("{base}{mistake}\n"));
        for verb in ["plan", "checksum"] {
            let (out, err) = expect(dir.path(), 3, &[verb, "web"]);
            assert!(wanted.iter().all(|word| err.contains(word)), "{mistake}: {err}");
            assert_eq!(out, "", "{mistake}");
        }
    }
}

#[test]
fn no_definition_no_base_and_a_cycle() {
    let dir = definition("from = { name = \"debian-12-*\" }\n");
    let (_, err) = expect(dir.path(), 3, &["plan", "gone"]);
    assert!(err.contains("gone"), "{err}");
    let (_, err) = expect(dir.path(), 4, &["plan", "web"]);
    assert!(err.contains("there is no region in region") && err.contains("oven import"), "{err}");
    oven::cloud::local::Region::open(&dir.path().join("region")).unwrap();
    let (_, err) = expect(dir.path(), 4, &["plan", "web"]);
    assert!(err.contains("debian-12-*") && err.contains("oven import"), "{err}");

    std::fs::write(dir.path().join("web/image.toml"), "from = \"../db\"\n").unwrap();
    std::fs::create_dir(dir.path().join("db")).unwrap();
    std::fs::write(dir.path().join("db/image.toml"), "from = \"../web\"\n").unwrap();
    let (_, err) = expect(dir.path(), 3, &["plan", "web"]);
    assert!(["web/image.toml", "db/image.toml", "from"].iter().all(|word| err.contains(word)), "{err}");
}

#[test]
fn usage_is_2() {
    let dir = tempfile::tempdir().unwrap();
    for args in [vec![], vec!["bake"], vec!["roast", "web"], vec!["bake", "--jobs", "0", "web"]] {
        let (out, _) = expect(dir.path(), 2, &args);
        assert_eq!(out, "", "{args:?}");
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let dir = definition("from = \"ami-0123456789abcdef0\"\n");
    std::fs::write(dir.path().join("os-release"), "ID=debian\n").unwrap();
    let verbs: [&[&str]; 11] = [
        &["--help"],
        &["bake", "--help"],
        &["help", "images", "list"],
        &["--version"],
        &["checksum", "web"],
        &["--json", "checksum", "web"],
        &["policy"],
        &["--json", "policy"],
        &["completions", "bash"],
        &["plugin", "list"],
        &["plan", "--os-release", "os-release", "web"],
    ];
    let run = |args: &[&str], out: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        command.env_clear().current_dir(dir.path()).args(args).stdout(out).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in verbs {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let read_only = File::open("/dev/null").unwrap();
        for (out, why) in [(full, "No space left on device"), (read_only, "Bad file descriptor")] {
            let (code, err) = run(args, out.into());
            assert_eq!(code, Some(8), "{args:?}: {err}");
            let message = format!("error: standard output cannot be written: {why}");
            assert!(err.contains(&message) && err.contains("Run the command again"), "{args:?}: {err}");
        }
        // A reader that has enough, such as `head`, is not a failure.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (code, err) = run(args, writer.into());
        assert!(code == Some(0) && !err.contains("error"), "{args:?}: {err}");
        assert_eq!(run(args, Stdio::null()).0, Some(0), "{args:?}");
    }
    // A verb that failed for another reason has nothing to print.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (code, err) = run(&["checksum", "gone"], full.into());
    assert!(code == Some(3) && !err.contains("standard output"), "{code:?}: {err}");
}

#[test]
fn every_help_fits_80_columns_and_goes_to_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let verbs =
        [vec![], vec!["bake"], vec!["plan"], vec!["checksum"], vec!["images"], vec!["images", "list"]];
    let more = [
        vec!["images", "show"],
        vec!["images", "remove"],
        vec!["import"],
        vec!["shell"],
        vec!["sweep"],
        vec!["doctor"],
        vec!["completions"],
    ];
    for mut args in verbs.into_iter().chain(more) {
        args.push("--help");
        let (out, _) = expect(dir.path(), 0, &args);
        assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    }
}

#[test]
fn checksum_prints_the_key_and_with_v_every_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/f"), "hello\n").unwrap();
    let (out, _) = expect(dir.path(), 0, &["checksum", "d"]);
    assert_eq!(out, "d4bb773a0da54b50d60e6089e12ed7e53c7e423c\n");
    // A definition's inputs count with it, and not where directories are listed.
    let (web, input) = (dir.path().join("web"), dir.path().join("common"));
    [&web, &input].into_iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    std::fs::write(web.join("image.toml"), "from = { name = \"b\" }\ninputs = [\"../common\"]\n").unwrap();
    std::fs::write(input.join("f"), "hello\n").unwrap();
    let (out, _) = expect(dir.path(), 0, &["checksum", "-v", "web"]);
    assert!(out.contains("  web/../common/f\n"), "{out}");
    assert_eq!(
        out.lines().last(),
        expect(dir.path(), 0, &["checksum", "web", "web/../common"]).0.lines().last()
    );
    assert!(!expect(dir.path(), 0, &["checksum", "-v", "web", "d"]).0.contains("common"));
    let (out, _) = expect(dir.path(), 0, &["checksum", "-v", "d"]);
    assert!(out.starts_with("f572d396fae9206628714fb2ce00f72e94f2258f  d/f\n"), "{out}");
    let (out, _) = expect(dir.path(), 0, &["--json", "checksum", "d"]);
    assert!(out.contains("\"ami_config_checksum\":\"d4bb773a0da54b50d60e6089e12ed7e53c7e423c\""), "{out}");
}

#[test]
fn with_json_every_verb_ends_with_a_result() {
    let dir = definition("from = { name = \"debian-12-*\" }\n");
    oven::cloud::local::Region::open(&dir.path().join("region")).unwrap();
    let cases: [(i32, &[&str]); 12] = [
        (0, &["checksum", "web"]),
        (0, &["images", "list"]),
        (0, &["sweep"]),
        (0, &["completions", "bash"]),
        (2, &["roast", "web"]),
        (2, &["bake", "--jobs", "many", "web"]),
        (2, &["import", "web/image.toml", "--name", "base"]),
        (3, &["plan", "gone"]),
        (3, &["checksum", "gone"]),
        (4, &["plan", "web"]),
        (4, &["images", "show", "ami-0123456789abcdef0"]),
        (4, &["sweep", "--run", "1f2e"]),
    ];
    for (code, args) in cases {
        let (out, _) = expect(dir.path(), code, &[&["--json"], args].concat());
        let lines = out.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line));
        let lines: Vec<_> = lines.collect();
        let result = lines.last().expect("a result");
        assert_eq!(
            (&result["event"], &result["exit_code"]),
            (&"result".into(), &code.into()),
            "{args:?}: {out}"
        );
        assert_eq!(result["error"]["message"].is_string(), code != 0, "{args:?}: {out}");
    }
}

#[test]
fn a_base_that_is_not_there_or_not_large_enough_names_the_definition() {
    let dir = definition("name = \"web\"\nfrom = { name = \"debian-12-*\" }\n");
    oven::cloud::local::Region::open(&dir.path().join("region")).unwrap();
    let (_, err) = expect(dir.path(), 4, &["plan", "web"]);
    assert!(err.contains("web/image.toml:2: `from`"), "{err}");
    let base = std::fs::File::create(dir.path().join("base.raw")).unwrap();
    base.set_len(2 << 30).unwrap();
    // Enough of an ext4 to be taken for one.
    for (offset, bytes) in
        [(1080, &[0x53, 0xef][..]), (1024 + 96, &[0x40, 0, 0, 0]), (1024 + 24, &[2, 0, 0, 0])]
    {
        std::os::unix::fs::FileExt::write_all_at(&base, bytes, offset).unwrap();
    }
    expect(dir.path(), 0, &["import", "base.raw", "--name", "debian-12-x"]);
    let image = "from = { name = \"debian-12-*\" }\n[disk]\nsize_gib = 1\n";
    std::fs::write(dir.path().join("web/image.toml"), image).unwrap();
    let (_, err) = expect(dir.path(), 3, &["plan", "web"]);
    assert!(
        err.contains("web/image.toml:3: `size_gib` of [disk] is 1, which is less than the 2 GiB"),
        "{err}"
    );
}

#[test]
fn a_region_inside_of_a_definition_is_refused() {
    let dir = definition("from = { name = \"debian-12-*\" }\n");
    for region in ["web/region", "web", "web/../web/.region"] {
        let (_, err) = expect(dir.path(), 3, &["plan", "--region-dir", region, "web"]);
        assert!(err.contains("is inside the directory web"), "{err}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("web")).unwrap().count(), 1, "nothing is made there");
}

#[test]
fn a_closed_pipe_is_no_crash() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("exec {} completions bash", env!("CARGO_BIN_EXE_oven"));
    let output =
        Command::new("sh").args(["-c", &format!("({script}) | true")]).current_dir(&dir).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn the_story_fits_a_screen_and_files_stay_small() {
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            let limit = if path.ends_with("src/bake/mod.rs") { 80 } else { 600 };
            assert!(lines <= limit, "{}: {lines} lines, {limit} at most", path.display());
        }
    }
}

#[test]
fn what_has_nothing_to_clean_up_ends_at_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    // All hole: it takes no room, and minutes to hash.
    std::fs::File::create(dir.path().join("d/big")).unwrap().set_len(200 << 30).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    let mut child = command.current_dir(dir.path()).args(["checksum", "d"]).spawn().unwrap();
    let reading = Path::new("/proc").join(child.id().to_string()).join("fd");
    let reads = || {
        let mut fds = reading.read_dir().unwrap().flatten();
        fds.any(|fd| fd.path().read_link().is_ok_and(|path| path.ends_with("d/big")))
    };
    while !reads() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        std::thread::yield_now();
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15), "{status}");
}

#[test]
fn a_plan_on_paper_takes_variables_and_brings_what_a_playbook_needs() {
    let dir =
        definition("from = { name = \"b\" }\n[[ansible]]\nplaybook = \"site.yml\"\n[vars]\nport = \"80\"\n");
    std::fs::write(dir.path().join("web/site.yml"), "- hosts: all\n").unwrap();
    std::fs::write(dir.path().join("os"), "ID=debian\nVERSION_ID=\"12\"\n").unwrap();
    let plan = |more: &[&str]| {
        let (out, err) = expect(dir.path(), 0, &[&["plan", "--os-release", "os", "web"], more].concat());
        (serde_json::from_str::<serde_json::Value>(&out).unwrap(), err)
    };
    let (request, _) = plan(&["--request", "--var", "port=81"]);
    assert_eq!(request["job"]["tools"], serde_json::json!(["ansible-playbook"]));
    let (_, err) = expect(dir.path(), 2, &["plan", "--os-release", "os", "web", "--var", "prot=81"]);
    assert!(err.contains("prot"), "{err}");
    let brings = |(plan, _): (serde_json::Value, String)| plan["tools"]["steps"].is_array();
    assert!(brings(plan(&[])), "an image that is not looked at has no Ansible");
    let has = ["/usr/bin/apt-get", "/usr/bin/dpkg-query", "/usr/bin/ansible-playbook"];
    let has: Vec<_> = has.iter().flat_map(|path| ["--has", path]).collect();
    let (there, err) = plan(&has);
    assert!(!err.contains("does not look for"), "{err}");
    assert!(!brings((there, err)), "the image has it");
    let (_, err) = plan(&[
        "--has",
        "/usr/bin/apt-get",
        "--has",
        "/usr/bin/dpkg-query",
        "--has",
        "/opt/ansible-playbook",
    ]);
    assert!(
        err.contains("--has /opt/ansible-playbook: the plugin debian does not look for this path"),
        "{err}"
    );
}
