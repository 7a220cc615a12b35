//! What a pull request of a stranger can do to somebody who only looks at it, and what verbs that only look change.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven::cloud::Tags;
use oven::cloud::local::Region;
use oven::ids::Architecture;
use oven::report::Report;
use oven_testing::pause;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// This text is only in files outside of the checkout, and in its `.git`. It must appear nowhere.
const CANARY: &str = "Q0FOQVJZ";
const BASE: &str = "from = { name = \"base\" }\n";
/// The most memory that a process of oven may take, in KiB.
const MEMORY_MAX: u64 = 256 << 10;
const TIME_MAX: Duration = Duration::from_secs(30);
/// How long oven may take to end after a signal.
const STOP_MAX: Duration = Duration::from_secs(2);

fn command(dir: &Path, region: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    command.env_clear().env("OVEN_REGION_DIR", region).current_dir(dir).args(args);
    command
}

fn oven(dir: &Path, region: &str, args: &[&str]) -> Output {
    command(dir, region, args).output().unwrap()
}

/// Returns oven's output, and the most memory in KiB that it or one of its processes had. A run that takes too long is
/// killed.
fn measured(mut command: Command) -> (Output, u64) {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (pid, begin, mut peak) = (child.id(), Instant::now(), 0);
    let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
    while !waiting.is_finished() {
        peak = peak.max(peak_memory(pid));
        if begin.elapsed() > TIME_MAX {
            // The process may have ended by itself just now.
            _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        pause(Duration::from_millis(1));
    }
    (waiting.join().unwrap(), peak)
}

/// The most memory in KiB that a process or one of its children has had; 0 if they have ended.
fn peak_memory(pid: u32) -> u64 {
    let read = |file: String| fs::read_to_string(file).unwrap_or_default();
    let status = read(format!("/proc/{pid}/status"));
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let own = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.flat_map(|thread| {
        let list = read(thread.path().join("children").display().to_string());
        list.split_whitespace().map(|child| child.parse().unwrap()).collect::<Vec<_>>()
    });
    children.map(peak_memory).fold(own, u64::max)
}

fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Everything below a directory: types, modes, sizes, times of changes.
fn listing(top: &Path) -> BTreeMap<String, String> {
    let (mut found, mut directories) = (BTreeMap::new(), vec![top.to_owned()]);
    while let Some(dir) = directories.pop() {
        let metadata = dir.symlink_metadata().unwrap();
        let times =
            |m: &fs::Metadata| format!("{:o} {} {} {}", m.mode(), m.len(), m.mtime_nsec(), m.ctime_nsec());
        found.insert(dir.display().to_string(), times(&metadata));
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            if metadata.is_dir() {
                directories.push(path);
            } else {
                found.insert(path.display().to_string(), times(&metadata));
            }
        }
    }
    found
}

/// A checkout with a definition `web`, and files outside of it that a pull request may want to read.
fn checkout() -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    let at = |path: &str| top.path().join(path);
    write(&at("outside/secret"), &format!("root:{CANARY}:0\n{CANARY}= {CANARY}\n"));
    write(&at("outside/script"), &format!("#!/bin/sh\n# {CANARY}\n"));
    write(&at("outside/def/image.toml"), &format!("name = \"{CANARY}\"\n{BASE}"));
    write(&at("outside/broken/image.toml"), &format!("{BASE}packages = [\"{CANARY}!\"]\n"));
    write(&at("outside/settings/oven.toml"), &format!("region = \"{CANARY}!\"\n"));
    write(&at("repo/.git/config"), &format!("[http]\nextraheader = {CANARY}\n"));
    write(&at("repo/web/image.toml"), BASE);
    write(&at("os-release"), "ID=debian\nVERSION_ID=12\n");
    top
}

/// A trick: its name, the text of image.toml (`None`: as it is), and further changes.
type Trick = (&'static str, Option<&'static str>, fn(&Path));

const TRICKS: &[Trick] = &[
    ("image.toml is a link to a text", None, |web| relink(web, "image.toml", "../../outside/secret")),
    ("image.toml is a link to a definition", None, |web| {
        relink(web, "image.toml", "../../outside/broken/image.toml")
    }),
    ("image.toml is a link to git's file", None, |web| relink(web, "image.toml", "../.git/config")),
    ("image.toml is a magic link", None, |web| relink(web, "image.toml", "/proc/self/environ")),
    ("image.toml is a device", None, |web| relink(web, "image.toml", "/dev/zero")),
    ("image.toml is a FIFO", None, |web| {
        fs::remove_file(web.join("image.toml")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, web.join("image.toml"), rustix::fs::Mode::RWXU).unwrap();
    }),
    ("oven.toml is a link to a text", Some(""), |web| relink(web, "oven.toml", "../../outside/secret")),
    ("oven.toml is a link to settings", Some(""), |web| {
        relink(web, "oven.toml", "../../outside/settings/oven.toml")
    }),
    ("oven.toml above is a link", Some(""), |web| {
        relink(web, "../oven.toml", "../outside/settings/oven.toml")
    }),
    ("oven.toml is a link to git's file", Some(""), |web| relink(web, "oven.toml", "../.git/config")),
    ("a source", Some("[[file]]\nsource = \"x\"\ntarget = \"/x\"\n"), |web| {
        relink(web, "x", "../../outside/secret")
    }),
    ("a template", Some(TEMPLATE), |web| relink(web, "x", "../../outside/secret")),
    ("a template in .git", Some(TEMPLATE), |web| relink(web, "x", "../.git/config")),
    ("a script", Some("[[run]]\nscript = \"x\"\n"), |web| relink(web, "x", "../../outside/script")),
    ("a playbook", Some("[[ansible]]\nplaybook = \"x\"\n"), |web| relink(web, "x", "../../outside/secret")),
    ("a package", Some("packages = [\"./x\"]\n"), |web| relink(web, "x", "../../outside/secret")),
    ("a key", Some(KEY), |web| relink(web, "x", "../../outside/secret")),
    ("a file that no key names", Some(""), |web| relink(web, "x", "../../outside/secret")),
    ("git's file, which no key names", Some(""), |web| relink(web, "x", "../.git/config")),
    ("an input outside", Some("inputs = [\"../../outside\"]\n"), |_| {}),
    ("an input in .git", Some("inputs = [\"../.git\"]\n"), |_| {}),
    ("a parent outside", None, |web| {
        fs::write(web.join("image.toml"), "from = \"../../outside/def\"\n").unwrap()
    }),
    ("a broken parent outside", None, |web| {
        fs::write(web.join("image.toml"), "from = \"../../outside/broken\"\n").unwrap();
    }),
    ("memory", Some(TEMPLATE), |web| {
        fs::write(web.join("x"), "{% set x = 'x' %}".to_owned() + &"{% set x = x ~ x %}".repeat(50)).unwrap();
    }),
    ("indent", Some(TEMPLATE), |web| {
        fs::write(web.join("x"), "{{ 'a'|indent(99999999999999) }}").unwrap();
    }),
    ("loops", Some(TEMPLATE), |web| {
        let text = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
        fs::write(web.join("x"), text).unwrap();
    }),
    ("searches in a long text", Some(TEMPLATE), |web| {
        let text = "{% for a in range(90000) %}{{ 'y' in ('x'*9000000) }}{% endfor %}";
        fs::write(web.join("x"), text).unwrap();
    }),
    ("a template of a hole", Some(TEMPLATE), |web| hole(&web.join("x"))),
    ("a link to itself", Some(TEMPLATE), |web| relink(web, "x", "x")),
    ("image.toml is a hole", None, |web| hole(&web.join("image.toml"))),
    ("image.toml is a directory", None, |web| {
        fs::remove_file(web.join("image.toml")).unwrap();
        fs::create_dir(web.join("image.toml")).unwrap();
    }),
    ("a large oven.toml", Some(""), |web| fs::write(web.join("oven.toml"), "#".repeat(2 << 20)).unwrap()),
    ("a key of a hole", Some(KEY), |web| hole(&web.join("x"))),
    ("a deep value", None, |web| {
        let deep = format!("packages = {}{}\n", "[".repeat(500_000), "]".repeat(500_000));
        fs::write(web.join("image.toml"), deep).unwrap();
    }),
    ("a deep key", None, |web| {
        fs::write(web.join("image.toml"), format!("{BASE}{}a = 1\n", "a.".repeat(500_000))).unwrap();
    }),
    ("a FIFO that no key names", Some(""), |web| {
        rustix::fs::mkfifoat(rustix::fs::CWD, web.join("x"), rustix::fs::Mode::RWXU).unwrap();
    }),
    ("a file that no key names, in a directory that is a link", Some("inputs = [\"../x\"]\n"), |web| {
        relink(web, "../x", "../outside");
    }),
    ("long paths that no key names", Some(""), |web| {
        let dir = (0..14).fold(web.to_owned(), |dir, _| dir.join("d".repeat(255)));
        fs::create_dir_all(&dir).unwrap();
        (0..5000).for_each(|n| fs::write(dir.join(format!("{n:0200}")), "").unwrap());
    }),
];

/// Definitions that need much time or memory, if nothing limits the sum of what they contain.
const SUMS: &[Trick] = &[
    ("many repositories with one large key", None, |web| {
        let lines = "mQENBF\n".repeat(140_000);
        let key =
            format!("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{lines}-----END PGP PUBLIC KEY BLOCK-----\n");
        fs::write(web.join("x"), key).unwrap();
        let repository =
            |n: usize| format!("[[repository]]\nname = \"r{n}\"\nurl = \"http://a.example\"\nkey = \"x\"\n");
        fs::write(web.join("image.toml"), BASE.to_owned() + &(0..10_000).map(repository).collect::<String>())
            .unwrap();
    }),
    ("many spellings of one package", None, |web| {
        package(&web.join("a.deb"), 64 << 20);
        let spellings: String = (0..900).map(|n| format!("\"{}a.deb\", ", "./".repeat(n + 1))).collect();
        fs::write(web.join("image.toml"), format!("{BASE}packages = [{spellings}]\n")).unwrap();
    }),
    ("many parents, each with slow templates", None, |web| {
        let toml = format!("from = \"./n\"\n{TEMPLATE}");
        fs::write(web.join("image.toml"), toml).unwrap();
        fs::write(web.join("x"), "{% for a in range(90000) %}{% endfor %}").unwrap();
        parents(web, 1000, &["image.toml", "x"]);
    }),
    ("many large parents", None, |web| {
        let toml = format!("from = \"./n\"\ndescription = \"x\"\n[tags]\na = \"{}\"\n#", "x".repeat(200));
        let vars: String = (0..30_000).map(|n| format!("v{n} = \"0123456789\"\n")).collect();
        fs::write(web.join("image.toml"), format!("{toml}\n[vars]\n{vars}")).unwrap();
        parents(web, 300, &["image.toml"]);
    }),
    ("many unknown keys", None, |web| {
        let keys: String = (0..100_000).map(|n| format!("k{n}=1\n")).collect();
        fs::write(web.join("image.toml"), format!("{BASE}{keys}")).unwrap();
    }),
    ("many templates with a mistake, and many variables", None, |web| {
        fs::write(web.join("x"), "{{ missing }}").unwrap();
        let file = |n: usize| format!("[[file]]\nsource = \"x\"\ntarget = \"/{n}\"\ntemplate = true\n");
        let files: String = (0..500).map(file).collect();
        let vars: String = (0..60_000).map(|n| format!("v{n}=\"\"\n")).collect();
        fs::write(web.join("image.toml"), format!("{BASE}{files}[vars]\n{vars}")).unwrap();
    }),
    ("many secrets, one of them twice", None, |web| {
        let names: String = (0..100_000).map(|n| format!("\"S{n}\",")).collect();
        let run = format!("[[run]]\ncommand = [\"true\"]\nsecrets = [{names}\"S99999\"]\n");
        fs::write(web.join("image.toml"), format!("{BASE}{run}")).unwrap();
    }),
    ("many secrets that are values", None, |web| {
        let names: String = (0..100_000).map(|n| format!("\"-{n}\",")).collect();
        let run = format!("[[run]]\ncommand = [\"true\"]\nsecrets = [{names}]\n");
        fs::write(web.join("image.toml"), format!("{BASE}{run}")).unwrap();
    }),
];

/// Writes a Debian package whose data is a hole of this size.
fn package(path: &Path, data: u64) {
    let header =
        |name: &str, size: u64| format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 644);
    let text = "Package: a\nVersion: 1\nArchitecture: all\n";
    let mut entry = tar::Header::new_gnu();
    entry.set_size(text.len() as u64);
    let mut control = tar::Builder::new(Vec::new());
    control.append_data(&mut entry, "control", text.as_bytes()).unwrap();
    let control = control.into_inner().unwrap();
    let start = [
        format!(
            "!<arch>\n{}2.0\n{}",
            header("debian-binary", 4),
            header("control.tar", control.len() as u64)
        )
        .into_bytes(),
        control,
        header("data.tar", data).into_bytes(),
    ]
    .concat();
    fs::write(path, &start).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(start.len() as u64 + data).unwrap();
}

/// Makes directories in each other, each with these files of the definition.
fn parents(web: &Path, count: usize, files: &[&str]) {
    let mut dir = web.to_owned();
    for _ in 0..count {
        dir.push("n");
        fs::create_dir(&dir).unwrap();
        files.iter().for_each(|file| fs::hard_link(web.join(file), dir.join(file)).unwrap());
    }
}

const TEMPLATE: &str = "[[file]]\nsource = \"x\"\ntarget = \"/x\"\ntemplate = true\n";
const KEY: &str = "[[repository]]\nname = \"r\"\nurl = \"https://r.example\"\nsuite = \"x\"\nkey = \"x\"\n";

/// A file of 1 TiB that needs no space. To read it takes minutes.
fn hole(path: &Path) {
    fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
}

fn relink(web: &Path, name: &str, target: &str) {
    _ = fs::remove_file(web.join(name));
    symlink(target, web.join(name)).unwrap();
}

/// A hostile pull request, and what is outside of its checkout.
struct PullRequest {
    name: &'static str,
    top: tempfile::TempDir,
    before: BTreeMap<String, String>,
    /// The most memory in KiB that a run took.
    peak: std::cell::Cell<u64>,
}

impl PullRequest {
    fn new((name, toml, change): &Trick) -> Self {
        let top = checkout();
        let web = top.path().join("repo/web");
        if let Some(toml) = toml {
            fs::write(web.join("image.toml"), format!("{BASE}{toml}")).unwrap();
        }
        change(&web);
        fs::create_dir(top.path().join("elsewhere")).unwrap();
        fs::write(top.path().join("elsewhere/mine"), "mine").unwrap();
        let before = listing(top.path());
        Self { name, top, before, peak: std::cell::Cell::default() }
    }

    /// Runs a verb that only looks, in a directory of the checkout. Returns its exit code, and what it prints.
    fn look(&self, dir: &str, args: &[&str]) -> (i32, String) {
        let (name, begin) = (self.name, Instant::now());
        let (output, memory) = measured(command(&self.top.path().join(dir), "../elsewhere", args));
        let text = printed(&output);
        let shown: String = text.chars().take(10_000).collect();
        assert!(begin.elapsed() < TIME_MAX, "{name}: {args:?} took {:?}: {shown}", begin.elapsed());
        assert!(memory <= MEMORY_MAX, "{name}: {args:?} took {} MiB of memory: {shown}", memory >> 10);
        assert!(!text.contains(CANARY), "{name}: {args:?} prints {shown}");
        assert!(output.status.code().is_some_and(|code| code != 101), "{name}: {args:?}: {shown}");
        assert!(!text.contains("/proc/self/environ\n"), "{shown}");
        assert_eq!(listing(self.top.path()), self.before, "{name}: {args:?}");
        self.peak.set(self.peak.get().max(memory));
        (output.status.code().unwrap(), shown)
    }
}

#[test]
fn a_hostile_pull_request_reads_nothing_outside_and_writes_nothing() {
    assert!(TRICKS.len() >= 30, "{}", TRICKS.len());
    let mut most = (0, "");
    for trick in TRICKS {
        let request = PullRequest::new(trick);
        let name = request.name;
        for args in [&["plan", "web"][..], &["--json", "plan", "web"]] {
            let (code, text) = request.look("repo", args);
            // Only the links that no key names are found after the region was opened.
            assert!(code == 3 || code == 4 && name.contains("no key"), "{name}: {code} {text}");
        }
        for args in [
            &["checksum", "web"][..],
            &["checksum", "-v", "web"],
            &["--json", "checksum", "web"],
            &["plan", "--os-release", "../os-release", "web"],
            &["plan", "--os-release", "../os-release", "--request", "web"],
        ] {
            let (code, text) = request.look("repo", args);
            let fine = name.contains("oven.toml")
                || name.contains("no key") && args[0] == "plan"
                || name.contains("parent") && args.contains(&"checksum");
            assert!(code == 3 || fine, "{name}: {args:?} gives {code} {text}");
        }
        for args in [
            &["images", "list"][..],
            &["--json", "images", "list"],
            &["images", "show", "ami-0123456789abcdef0"],
            &["export", "ami-0123456789abcdef0", "x.raw"],
            &["sweep", "--dry-run"],
            &["policy"],
            &["plugin", "list"],
            &["import", "gone.raw", "--name", "x"],
        ] {
            request.look("repo/web", args);
        }
        most = most.max((request.peak.get(), name));
    }
    assert!(most.0 > 0, "no memory was measured");
    println!("the most memory: {} MiB in \"{}\"", most.0 >> 10, most.1);
}

#[test]
fn a_definition_has_limits_for_the_sum_of_what_it_contains() {
    for trick in SUMS {
        let request = PullRequest::new(trick);
        let (code, text) = request.look("repo", &["plan", "web"]);
        assert_eq!(code, 3, "{}: {text}", request.name);
        assert!(request.peak.get() > 0, "no memory was measured");
    }
}

/// The verbs that only look have nothing to clean up, so a signal ends them immediately.
#[test]
fn a_signal_ends_a_long_look_at_a_definition() {
    let top = checkout();
    region(&top.path().join("region"), &top.path().join("raw"));
    hole(&top.path().join("repo/web/hole"));
    let before = listing(top.path());
    for args in [["plan", "web"], ["checksum", "web"]] {
        let mut child = command(&top.path().join("repo"), "../region", &args).spawn().unwrap();
        let reads = || fs::read_dir(format!("/proc/{}/fd", child.id())).into_iter().flatten().flatten();
        oven_testing::until("a read of the hole", || {
            let mut reads = reads().filter_map(|fd| fs::read_link(fd.path()).ok());
            reads.find(|file| file.ends_with("web/hole"))
        });
        // A shell without job control lets its background processes ignore SIGINT, and they inherit this.
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let begin = Instant::now();
        let status = child.wait().unwrap();
        assert!(begin.elapsed() < STOP_MAX, "{args:?}: {:?}", begin.elapsed());
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{args:?}: {status}");
        assert_eq!(listing(top.path()), before, "{args:?}");
    }
}

#[test]
fn a_link_that_no_key_names_is_refused_by_a_plan() {
    for target in ["../../outside/secret", "../.git/config"] {
        let top = checkout();
        region(&top.path().join("region"), &top.path().join("raw"));
        relink(&top.path().join("repo/web"), "x", target);
        let output = oven(&top.path().join("repo"), "../region", &["plan", "web"]);
        let text = printed(&output);
        assert_eq!(output.status.code(), Some(3), "{text}");
        assert!(text.contains("web/x: is a symbolic link that resolves to"), "{text}");
    }
}

#[test]
fn a_parent_outside_is_read_only_if_the_user_names_it() {
    let top = checkout();
    region(&top.path().join("region"), &top.path().join("raw"));
    fs::write(top.path().join("repo/web/image.toml"), "from = \"../../outside/def\"\n").unwrap();
    let output = oven(&top.path().join("repo"), "../region", &["plan", "web"]);
    assert!(printed(&output).contains("name its directory on the command line, too"), "{}", printed(&output));
    let output = oven(&top.path().join("repo"), "../region", &["plan", "../outside/def", "web"]);
    assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
}

/// A region with one image, `base`.
fn region(dir: &Path, raw: &Path) -> String {
    fs::write(raw, [7; 4096]).unwrap();
    let region = Region::open(dir).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (tags, report) = (Tags::new(), Report::silent());
    runtime.block_on(region.import(raw, "base", Architecture::HOST, &tags, &report)).unwrap().id.0
}

/// The verbs that only look, or that change only what is in a region.
fn looks(image: &str) -> Vec<Vec<&str>> {
    vec![
        vec!["plan", "web"],
        vec!["images", "list"],
        vec!["images", "show", image],
        vec!["images", "remove", "ami-00000000000000000"],
        vec!["export", "ami-00000000000000000", "out.raw"],
        vec!["sweep", "--dry-run"],
        vec!["doctor"],
        vec!["checksum", "web"],
        vec!["policy"],
        vec!["plugin", "list"],
    ]
}

#[test]
fn verbs_that_look_make_no_region_and_change_nothing() {
    let top = tempfile::tempdir().unwrap();
    write(&top.path().join("web/image.toml"), BASE);
    write(&top.path().join("other/logs/mine"), "mine");
    write(&top.path().join("other/images/mine.jpg"), "mine");
    fs::set_permissions(top.path().join("other/images"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(top.path().join("empty")).unwrap();
    let before = listing(top.path());
    for dir in ["gone/deeper", "other", "empty", "."] {
        for args in looks("ami-00000000000000000") {
            let output = oven(top.path(), dir, &args);
            let (text, code) = (printed(&output), output.status.code());
            assert_eq!(listing(top.path()), before, "{args:?} in {dir}");
            match args[0] {
                "checksum" | "policy" | "plugin" => assert_eq!(code, Some(0), "{args:?}: {text}"),
                "doctor" => assert!(text.contains("there is no region yet"), "{text}"),
                _ => {
                    assert_eq!(code, Some(4), "{args:?} in {dir}: {text}");
                    assert!(text.contains(&format!("there is no region in {dir}")), "{args:?}: {text}");
                    assert!(text.contains("oven import RAW --name NAME"), "{args:?}: {text}");
                }
            }
        }
    }
}

#[test]
fn verbs_that_look_change_nothing_in_a_region() {
    let top = tempfile::tempdir().unwrap();
    write(&top.path().join("web/image.toml"), BASE);
    let image = region(&top.path().join("region"), &top.path().join("raw"));
    // A killed bake left it. `oven sweep` removes it, and `--dry-run` does not.
    let orphan = top.path().join("region/volumes/vol-0123456789abcdef0.img");
    write(&orphan, "orphan");
    fs::set_permissions(orphan.parent().unwrap(), fs::Permissions::from_mode(0o700)).unwrap();
    let mut first = None;
    for args in looks(&image) {
        let before = listing(top.path());
        let output = oven(top.path(), "region", &args);
        let now = listing(top.path());
        assert_eq!(now, before, "{args:?}: {}", printed(&output));
        first.get_or_insert(output);
    }
    assert!(printed(&first.unwrap()).contains("no image of the definition `web` exists yet"));
    assert_eq!(oven(top.path(), "region", &["sweep"]).status.code(), Some(0));
    assert!(!orphan.exists());
}

#[test]
fn only_an_import_makes_a_region_and_only_in_an_empty_directory() {
    let top = tempfile::tempdir().unwrap();
    // A file system without a partition table is a disk.
    let raw = top.path().join("disk.raw");
    fs::File::create(&raw).unwrap().set_len(8 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&raw).status();
    assert!(made.is_ok_and(|status| status.success()), "this test needs mkfs.ext4");
    write(&top.path().join("other/mine"), "mine");
    write(&top.path().join("pictures/images/mine.jpg"), "mine");
    let import = |dir: &str| oven(top.path(), dir, &["import", "disk.raw", "--name", "base"]);
    for dir in ["other", "pictures", "."] {
        let before = listing(top.path());
        let output = import(dir);
        assert_eq!(output.status.code(), Some(3), "{}", printed(&output));
        assert!(printed(&output).contains("is neither empty nor a region"), "{}", printed(&output));
        assert_eq!(listing(top.path()), before);
    }
    // A file that is not a disk makes no region either.
    let before = listing(top.path());
    assert_eq!(oven(top.path(), "new", &["import", "other/mine", "--name", "b"]).status.code(), Some(2));
    assert_eq!(listing(top.path()), before);
    fs::create_dir(top.path().join("empty")).unwrap();
    for dir in ["empty", "new/deeper"] {
        for _ in 0..2 {
            let output = import(dir);
            assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
        }
        let list = oven(top.path(), dir, &["images", "list"]);
        assert!(printed(&list).contains("base"), "{}", printed(&list));
    }
    // A verb that looks does not change the mode of a directory. An import makes the directories of a region private.
    let images = top.path().join("empty/images");
    fs::set_permissions(&images, fs::Permissions::from_mode(0o755)).unwrap();
    let before = listing(top.path());
    let output = oven(top.path(), "empty", &["images", "list"]);
    assert_eq!(output.status.code(), Some(8), "{}", printed(&output));
    assert!(printed(&output).contains("chmod 700"), "{}", printed(&output));
    assert_eq!(listing(top.path()), before);
    assert_eq!(import("empty").status.code(), Some(0));
    assert_eq!(fs::metadata(&images).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_plan_says_which_secrets_a_bake_would_pass_on() {
    let top = tempfile::tempdir().unwrap();
    region(&top.path().join("region"), &top.path().join("raw"));
    let toml = format!("{BASE}[[run]]\ncommand = [\"true\"]\nsecrets = [\"ONE\", \"TWO\"]\n");
    write(&top.path().join("web/image.toml"), &toml);
    let plan = |ci: Option<&str>, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        command.env_clear().env("OVEN_REGION_DIR", "region").env("ONE", CANARY).current_dir(top.path());
        command.envs(ci.map(|ci| ("CI", ci))).arg("plan").arg("web").args(args);
        printed(&command.output().unwrap())
    };
    let text = plan(None, &[]);
    assert!(
        text.contains("ONE (in the environment)") && text.contains("TWO (not in the environment"),
        "{text}"
    );
    let text = plan(None, &["--secret", "ONE"]);
    assert!(
        text.contains("ONE (in the") && text.contains("TWO (not permitted: a bake needs --secret TWO)"),
        "{text}"
    );
    let text = plan(Some("true"), &[]);
    assert!(text.contains("ONE (not permitted") && text.contains("TWO (not permitted"), "{text}");
    let text = plan(Some("true"), &["--json", "--secret", "ONE"]);
    assert!(text.contains("\"permitted_secrets\":[\"ONE\"]"), "{text}");
    let text = plan(None, &["--secret", &format!("ONE={CANARY}")]);
    assert!(text.contains("an argument of --secret has a value"), "{text}");
    assert!(!text.contains(CANARY), "{text}");
}
