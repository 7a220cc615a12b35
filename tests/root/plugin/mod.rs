//! Plugins that are executables: what they may, what they cannot, and that they bake.
//!
//! Real: the containment, the conformance suite, the bakes on a local region. Not real: the systems. Their image is an
//! 8 MiB disk with busybox, and its package manager is a script that has its list in a file.

mod faults;

use oven_testing::programs::{copy_program, write_program};
use oven_testing::{LocalWorld, stderr};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Stands in for a package manager: `add` notes, `list` prints. It knows `hello` and `world`.
const PKG: &str = r#"#!/bin/sh
db=/var/lib/pkg
case $1 in
add) shift; for name; do
        case $name in hello|world) ;; *) echo "no such package: $name"; exit 1 ;; esac
        mkdir -p $db; echo 1.0 > $db/$name
    done ;;
list) for file in $db/*; do [ ! -e $file ] || echo "${file##*/}	1.0	noarch"; done ;;
esac
"#;

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/examples").join(name).to_str().unwrap().to_owned()
}

fn tiny() -> LocalWorld {
    LocalWorld::of("tiny", "ID=tiny\n", &[("bin/pkg", PKG)])
}

/// An executable file in the world.
fn plugin(world: &LocalWorld, name: &str, text: &str) -> PathBuf {
    let path = world.path(name);
    write_program(&path, text);
    path
}

fn result(out: &str) -> Value {
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}

/// What the finished image says of its packages.
fn packages(world: &LocalWorld, ami: &str) -> String {
    world.expect(0, &["images", "show", ami]).0
}

#[test]
fn the_smallest_plugin_in_sh_bakes() {
    let path = example("tiny.sh");
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 11, "the README says so");
    let world = tiny();
    let (out, err) = world.expect(0, &["plugin", "check", &path]);
    assert!(out.contains("conforms; golden plans: 1"), "{out}\n{err}");

    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"hello\", \"world\"]\n",
    );
    let (ami, err) = world.expect(0, &["--plugin", &path, "bake", "image"]);
    assert!(err.contains("installing packages") && err.contains("distro = \"tiny\""), "{err}");
    let shown = packages(&world, ami.trim());
    assert!(shown.contains("hello") && shown.contains("world"), "{shown}");
    world.assert_no_traces("a bake with a plugin");

    // The plan's own words reach whoever wrote the definition.
    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"nothing-such\"]\n",
    );
    let (_, err) = world.expect(5, &["--plugin", &path, "bake", "image"]);
    assert!(err.contains("no such package: nothing-such"), "{err}");
    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"hello=1.*\"]\n",
    );
    let (_, err) = world.expect(3, &["--plugin", &path, "bake", "image"]);
    assert!(
        err.contains("planning the installation: the smallest plugin only installs packages by name"),
        "{err}"
    );
    world.assert_no_traces("bakes that failed");
}

/// Warnings of an image's programs are not rows of its list of packages, and a row that is none is shown.
#[test]
fn a_fact_is_standard_output_alone() {
    let path = example("tiny.sh");
    let world_with = |list: &str| {
        let pkg = PKG.replace("list) ", &format!("list) {list}; "));
        let world = LocalWorld::of("tiny", "ID=tiny\n", &[("bin/pkg", &pkg)]);
        let toml = "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"hello\"]\n";
        world.write("image/image.toml", toml);
        world
    };
    for list in [
        "echo 'warning: the database is old' >&2",
        "echo >&2; printf 'x\\t1\\n' >&2; head -c 100000 /dev/zero >&2",
        "echo; printf '\\t\\n'",
    ] {
        let world = world_with(list);
        let (ami, err) = world.expect(0, &["--plugin", &path, "bake", "image"]);
        assert!(!err.contains("database is old"), "{err}");
        let shown = packages(&world, ami.trim());
        assert!(shown.contains("hello") && !shown.contains("warning"), "{shown}");
    }
    for (list, shown) in [
        ("echo 'warning: the database is old'", "`warning: the database is old`"),
        ("printf 'WARN:\\tx\\ty\\n'", "WARN:"),
        ("echo hello 1.0 noarch", "`hello 1.0 noarch`"),
        ("head -c 100000 /dev/zero | tr '\\0' x; echo", "xxxxxxxx…`"),
    ] {
        let world = world_with(list);
        // The base's own package manager prints the line.
        let (_, err) = world.expect(3, &["--plugin", &path, "bake", "image"]);
        assert!(err.contains("/bin/pkg") && err.contains("does not describe a package"), "{err}");
        assert!(err.contains(shown) && err.len() < 4000, "{shown}: {err}");
        world.assert_no_traces("a list with a line that is none");
    }
}

/// Stands in for xbps: it knows `nginx` and `tree`, and installs what was downloaded before.
const XBPS: [(&str, &str); 4] = [
    (
        "usr/bin/xbps-install",
        r#"#!/bin/sh
download= sync=
while :; do case $1 in
    -S) sync=1 ;;
    -yD) download=1 ;;
    -y | --) ;;
    *) break ;;
esac; shift; done
mkdir -p /var/db/xbps /var/cache/xbps
[ -z "$sync" ] || exit 0
for name; do
    pkg=${name%-2.1.1_1}
    case $pkg in nginx|tree) ;; *) echo "Package '$name' not found in repository pool."; exit 2 ;; esac
    if [ $download ]; then echo > /var/cache/xbps/$pkg; continue; fi
    [ -e /var/cache/xbps/$pkg ] || { echo "ERROR: $pkg: not downloaded"; exit 1; }
    echo "ii $pkg-2.1.1_1   A stand-in" > /var/db/xbps/$pkg
done
"#,
    ),
    ("usr/bin/xbps-query", "#!/bin/sh\ncat /var/db/xbps/* 2>/dev/null\ntrue\n"),
    ("usr/bin/xbps-uhelper", "#!/bin/sh\necho x86_64\n"),
    ("usr/bin/xbps-remove", "#!/bin/sh\nrm -f /var/cache/xbps/*\n"),
];

/// The author's guide made it. That the real xbps takes these commands is not tried here.
#[test]
fn the_plugin_of_the_guide_in_python_bakes() {
    let path = example("void.py");
    let world = LocalWorld::of("void", "ID=\"void\"\nPRETTY_NAME=\"Void Linux\"\n", &XBPS);
    let (out, err) = world.expect(0, &["plugin", "check", &path]);
    assert!(out.contains("conforms; golden plans: 3"), "{out}\n{err}");

    let define = |packages: &str| {
        let toml = format!(
            "name = \"image\"\nfrom = {{ name = \"void\" }}\ndistro = \"void\"\npackages = {packages}\n"
        );
        world.write("image/image.toml", &toml);
    };
    define("[\"nginx\", \"tree=2.1.1_1\"]");
    let (ami, err) = world.expect(0, &["--plugin", &path, "bake", "image"]);
    assert!(err.contains("downloading 2 packages") && err.contains("packages: 2 installed"), "{err}");
    let shown = packages(&world, ami.trim());
    assert!(shown.contains("tree  2.1.1_1  x86_64"), "{shown}");

    define("[\"nginx\",\n\"nginks\"]");
    let (_, err) = world.expect(3, &["--plugin", &path, "bake", "image"]);
    assert!(err.contains("image.toml:5: `packages`") && err.contains("has the package `nginks`"), "{err}");
    define("[\"@base-devel\"]");
    world.expect(3, &["--plugin", &path, "bake", "image"]);
    define("[\"tree=2.*\"]");
    let (_, err) = world.expect(3, &["--plugin", &path, "bake", "image"]);
    assert!(err.contains("such as 2.1.1_1"), "{err}");
    world.assert_no_traces("bakes of a plugin in Python");
}

#[test]
fn a_plugin_that_a_definition_names_counts() {
    let world = tiny();
    let text = fs::read_to_string(example("tiny.sh")).unwrap();
    let path = plugin(&world, "tiny.sh", &text);
    let path = path.to_str().unwrap();
    let toml = "name = \"image\"\nfrom = { name = \"tiny\" }\npackages = [\"hello\"]\n";
    let bake = |world: &LocalWorld| {
        let (ami, err) = world.expect(0, &["--plugin", path, "bake", "image"]);
        (ami, err)
    };
    world.write("image/image.toml", &format!("distro = \"tiny\"\n{toml}"));
    let (first, err) = bake(&world);
    assert!(!err.contains("To bake a new image when the plugin changes"), "{err}");
    assert_eq!(bake(&world).0, first);
    plugin(&world, "tiny.sh", &format!("{text}# another\n"));
    let (out, _) = world.expect(0, &["--plugin", path, "plan", "image"]);
    assert!(out.contains("the plugin tiny changed"), "{out}");
    assert_ne!(bake(&world).0, first);

    // One that is not there, and one that is not this image's.
    let (_, err) = world.expect(3, &["bake", "image"]);
    assert!(
        err.contains("image.toml:1: `distro`: there is no plugin \"tiny\"")
            && err.contains("Known plugins: "),
        "{err}"
    );
    world.write("image/image.toml", &format!("distro = \"debian\"\n{toml}"));
    let (_, err) = world.expect(3, &["--plugin", path, "bake", "image"]);
    assert!(err.contains("the plugin debian does not support `tiny`"), "{err}");
    world.write("image/image.toml", &format!("distro = \"De bian\"\n{toml}"));
    assert!(world.expect(3, &["bake", "image"]).1.contains("image.toml:1: `distro` is \"De bian\""));
}

#[test]
fn a_file_in_a_cache_that_a_plugin_lists_fails_the_bake() {
    let world = tiny();
    let text = fs::read_to_string(example("tiny.sh")).unwrap();
    let caches = "plan: {caches: [{path: \"/var/cache/pkg\", holds: \"packages\"}], facts: ";
    let lists = text.replace("plan: {facts: ", caches);
    assert_ne!(lists, text);
    let path = plugin(&world, "tiny.sh", &lists);
    let path = path.to_str().unwrap();
    world.write("image/fill.sh", "#!/bin/sh\nmkdir -p /var/cache/pkg/part\necho x > /var/cache/pkg/hello\n");
    let toml = "name = \"image\"\nfrom = { name = \"tiny\" }\n[[run]]\nscript = \"fill.sh\"\n";
    world.write("image/image.toml", toml);
    let (_, err) = world.expect(5, &["--plugin", path, "bake", "image"]);
    let found = "/var/cache/pkg/hello: a file in the package manager's cache /var/cache/pkg";
    assert!(err.contains(found) && !err.contains("/var/cache/pkg/part"), "{err}");
    world.assert_no_traces("a bake with a file in a cache");

    world.write("image/image.toml", &format!("{toml}[clean]\nkeep = [\"/var/cache/pkg/hello\"]\n"));
    world.expect(0, &["--plugin", path, "bake", "image"]);
    // To a plan that does not list it, it is a directory like any other.
    world.write("image/image.toml", toml);
    world.expect(0, &["--plugin", &example("tiny.sh"), "bake", "image"]);
}

#[test]
fn a_tie_names_both_and_a_definition_picks() {
    let world = tiny();
    let text = fs::read_to_string(example("tiny.sh")).unwrap();
    let one = plugin(&world, "one.sh", &text);
    let two = plugin(&world, "two.sh", &text);
    let (one, two) = (one.to_str().unwrap(), two.to_str().unwrap());
    let bake = ["--plugin", one, "--plugin", two, "bake", "image"];
    let (_, err) = world.expect(3, &bake);
    assert!(err.contains(&format!("one (--plugin {one}) and two (--plugin {two})")), "{err}");
    assert!(err.contains("distro = \"one\" or \"two\""), "{err}");
    world.write("image/image.toml", "distro = \"two\"\nname = \"image\"\nfrom = { name = \"tiny\" }\n");
    world.expect(0, &bake);
    // A built-in plugin's name is taken.
    let path = plugin(&world, "debian.sh", &text);
    let (_, err) = world.expect(2, &["--plugin", path.to_str().unwrap(), "plugin", "list"]);
    assert!(err.contains("has the name of the built-in plugin"), "{err}");
}

/// The same plugin, in the program and next to it.
#[test]
fn a_distro_in_rust_is_an_executable_too() {
    let world = LocalWorld::empty();
    let served = world.path("debian-too");
    copy_program(Path::new(env!("CARGO_BIN_EXE_oven-test-plugin")), &served);
    let served = served.to_str().unwrap();
    world.write("os", "ID=debian\nVERSION_CODENAME=bookworm\n");
    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = \"ami-0123456789abcdef0\"\npackages = [\"jq=1.*\"]\n",
    );
    let plan = |args: &[&str]| {
        let (out, _) = world.expect(0, &[args, &["plan", "--os-release", "os", "image"]].concat());
        serde_json::from_str::<Value>(&out).unwrap()
    };
    let built_in = plan(&[]);
    assert_eq!(built_in["expect"]["packages"][0]["name"], "jq", "{built_in:#}");
    let (_, err) = world.expect(3, &["--plugin", served, "plan", "--os-release", "os", "image"]);
    assert!(err.contains("debian (built in) and debian-too"), "{err}");
    world.write("image/image.toml", "distro = \"debian-too\"\nname = \"image\"\nfrom = \"ami-0123456789abcdef0\"\npackages = [\"jq=1.*\"]\n");
    assert_eq!(plan(&["--plugin", served]), built_in);
    // What is not asked for on the command line is not there.
    let (_, err) = world.expect(
        3,
        &["--plugin", served, "plan", "--os-release", "os", "--has", "/usr/bin/dpkg-query", "image"],
    );
    assert!(err.contains("the image has no /usr/bin/apt-get"), "{err}");
    // Called by hand, it says how.
    let usage = Command::new(served).arg("bake").output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(stderr(&usage).contains("claims|plan"));
}

#[test]
fn list_shows_where_each_came_from_and_what_it_claims() {
    let world = LocalWorld::empty();
    let path = example("void.py");
    let (out, _) = world.expect(0, &["--plugin", &path, "plugin", "list"]);
    assert!(out.contains("debian  (built in)\n  exact: debian 12, ubuntu 24.04\n"), "{out}");
    for (id, first) in [("redhat", "amzn 2023, amzn 2, rhel 9.4"), ("suse", "sles 15.6, opensuse-leap 15.6")]
    {
        assert!(out.contains(&format!("{id}  (built in)\n  exact: {first}")), "{out}");
    }
    assert!(out.contains(&format!("void  (--plugin {path})\n  exact: void\n")), "{out}");
    let (out, _) = world.expect(0, &["--json", "--plugin", &path, "plugin", "list"]);
    let plugins = result(&out)["plugins"].as_array().unwrap().clone();
    let void = plugins.iter().find(|plugin| plugin["id"] == "void").unwrap();
    assert_eq!(void["claims"]["exact"][0], "void");
    assert_eq!(void["sha256"].as_str().unwrap().len(), 64);
    assert!(plugins.iter().any(|plugin| plugin["origin"] == "built in" && plugin["sha256"].is_null()));
}

/// As a user without rights, for whom the kernel may have namespaces or not.
#[test]
fn authors_need_no_root() {
    let world = LocalWorld::empty();
    fs::set_permissions(world.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let own = world.path("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(12345), Some(12345)).unwrap();
    let oven = world.path("oven");
    copy_program(Path::new(env!("CARGO_BIN_EXE_oven")), &oven);
    let author = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(&oven).args(args);
        let output = command.current_dir(&own).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(&output);
        (output.status.code(), text)
    };
    for (lang, file) in [("python", "one.py"), ("sh", "two.sh")] {
        let name = file.split('.').next().unwrap();
        let (code, text) = author(&["plugin", "new", name, "--lang", lang]);
        assert_eq!(code, Some(0), "{text}");
        let (code, text) = author(&["plugin", "check", file]);
        assert_eq!(code, Some(3), "there is no golden plan yet: {text}");
        assert!(text.contains("packages: no plan is stored yet") && text.contains("2 faults"), "{text}");
        let (code, text) = author(&["plugin", "check", file, "--bless"]);
        assert_eq!(code, Some(0), "{text}");
        let (code, text) = author(&["plugin", "check", file]);
        assert!(code == Some(0) && text.contains("conforms; golden plans: 2"), "{text}");
        let (code, text) = author(&["plugin", "new", name, "--lang", lang]);
        assert!(code == Some(2) && text.contains("already exists"), "{text}");
    }
    fs::write(world.path("own/os"), "ID=one\n").unwrap();
    let (code, text) = author(&["plan", "--os-release", "os", "--plugin", "one.py", "--request"]);
    assert!(code == Some(0) && text.contains("/usr/bin/pkg"), "{text}");
    let (code, text) = author(&["plan", "--os-release", "os"]);
    assert!(code == Some(3) && text.contains("no plugin supports the base image"), "{text}");
}

/// Runs its arguments as user 12345 of a user namespace in which the kernel makes no others.
const WITHOUT_NAMESPACES: &str = r#"
import ctypes, os, sys
made, mapped = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    if ctypes.CDLL(None).unshare(0x10000000):
        os._exit(99)
    os.write(made[1], b"x")
    os.read(mapped[0], 1)
    os.setgid(0)
    os.setuid(0)
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
    os.execv(sys.argv[1], sys.argv[1:])
os.read(made[0], 1)
for kind in ("uid", "gid"):
    open(f"/proc/{child}/{kind}_map", "w").write("0 0 70000")
os.write(mapped[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"#;

#[test]
fn where_the_kernel_gives_no_namespaces_it_runs_as_the_user_and_oven_says_so() {
    let world = LocalWorld::empty();
    fs::set_permissions(world.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let oven = world.path("oven");
    copy_program(Path::new(env!("CARGO_BIN_EXE_oven")), &oven);
    world.write("os", "ID=spied\n");
    let sleeper = format!("sleep 2{}", std::process::id());
    let spy = |also: &str| {
        let text = format!(
            "#!/bin/sh\n[ $1 = claims ] && echo '{{\"api\":1,\"claim\":\"exact\"}}' && exit\n{also}\n\
             echo \"{{\\\"api\\\":1,\\\"refused\\\":\\\"id=$(id -u) names=$(env | cut -d= -f1 | sort | tr '\\n' ',')\\\"}}\"\n"
        );
        plugin(&world, "spy.sh", &text);
        let mut command = Command::new("python3");
        command.args(["-c", WITHOUT_NAMESPACES]).arg(&oven).args([
            "plan",
            "--os-release",
            "os",
            "--plugin",
            "spy.sh",
        ]);
        let output = command.current_dir(world.dir.path()).output().unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, err) = spy("");
    assert!(code == Some(3) && err.contains("id=12345 names=HOME,LC_ALL,PATH,"), "{err}");
    assert!(err.contains("spy ran without a sandbox, with all your permissions"), "{err}");
    // Its end is seen to even so.
    let (code, err) = spy(&format!("setsid sh -c '{sleeper} & {sleeper}' >/dev/null 2>&1 &"));
    assert!(code == Some(8) && err.contains("left processes running: "), "{err}");
    let (code, err) = spy(&sleeper);
    assert!(code == Some(8) && err.contains("longer than 8 s"), "{err}");
    let alive = Command::new("pgrep").args(["-f", &format!("^{sleeper}$")]).output().unwrap();
    assert_eq!(alive.status.code(), Some(1), "somebody lives: {}", String::from_utf8_lossy(&alive.stdout));
}
