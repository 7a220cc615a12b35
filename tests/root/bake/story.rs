//! Real bakes: a Debian base image, real packages from the mirror; what is in the image afterwards.

use oven_testing::{ImageReader, LocalWorld};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

fn base(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run scripts/test root"))
        .into()
}

/// A region with the full Debian image as `debian-12-test`, and copies of the examples.
pub fn debian() -> LocalWorld {
    let world = LocalWorld::empty();
    world.expect(0, &["import", base("OVEN_TEST_BASE").to_str().unwrap(), "--name", "debian-12-test"]);
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let copied = Command::new("cp").arg("-r").arg(examples).arg(world.path("examples")).status().unwrap();
    assert!(copied.success());
    world
}

/// A region with a small Debian that has apt, as `tiny`.
pub fn small() -> LocalWorld {
    let world = LocalWorld::empty();
    world.expect(0, &["import", base("OVEN_TEST_TINY").to_str().unwrap(), "--name", "small"]);
    world
}

#[test]
fn two_definitions_baked_once_and_right() {
    let world = debian();
    let (first, _) = world.expect(0, &["bake", "examples/base", "examples/web"]);
    world.assert_no_traces("after the bake");
    let ids: Vec<&str> = first.lines().map(|line| line.split('\t').next().unwrap()).collect();
    assert_eq!(ids.len(), 2);
    let file = std::fs::read_to_string(world.path("examples/web/.ami_id.json")).unwrap();
    assert_eq!(file, format!("{{\"ami_id\": \"{}\"}}\n", ids[1]));

    // Asked again: the same ids, and no work.
    let files = world.files();
    let hit = |_| {
        let start = Instant::now();
        let (again, _) = world.expect(0, &["bake", "examples/base", "examples/web"]);
        assert_eq!(first, again);
        start.elapsed()
    };
    let best = (0..5).map(hit).min().unwrap();
    // 100 ms in a release build on a quiet machine (scripts/bench); this one is neither.
    assert!(best < Duration::from_millis(1000), "{best:?}");
    assert_eq!(files, world.files());
    let (plan, _) = world.expect(0, &["plan", "examples/web"]);
    assert!(plan.contains(&format!("web: already baked as {}", ids[1])), "{plan}");

    let (base, web) = (ImageReader::in_file(&base("OVEN_TEST_BASE")), ImageReader::of(&world, ids[1]));
    assert_eq!(web.audit(), "");
    assert_eq!(web.read("/etc/resolv.conf"), base.read("/etc/resolv.conf"));
    assert!(web.read("/etc/resolv.conf").is_some());
    assert_eq!(web.read("/etc/machine-id").as_deref(), Some(""));
    assert_eq!(web.read("/usr/sbin/policy-rc.d"), None);
    assert!(web.list("/etc/systemd/system/multi-user.target.wants").contains(&"nginx.service".to_owned()));
    assert!(web.read("/etc/nginx/conf.d/site.conf").unwrap().contains("listen 8080"));
    assert!(web.read("/srv/site/index.html").unwrap().contains("Baked by oven"));
    assert_eq!(web.read("/etc/nginx/sites-enabled/default"), None);
    let keys = web.list("/etc/ssh");
    assert!(!keys.iter().any(|name| name.starts_with("ssh_host_")), "{keys:?}");
    assert!(
        web.list("/etc/systemd/system").iter().any(|name| name.contains("keys.service")),
        "nothing makes host keys"
    );
    assert_eq!(web.list("/var/lib/apt/lists").iter().filter(|n| n.contains("Packages")).count(), 0);
    assert_eq!(web.list("/run"), base.list("/run"), "what a step makes there is not the image's");
    assert!(web.list("/tmp").is_empty(), "{:?}", web.list("/tmp"));
    assert!(web.debugfs("features").0.split_whitespace().all(|word| word != "needs_recovery"));
    let (clean, report) = web.fsck();
    assert!(clean, "{report}");

    let (shown, _) = world.expect(0, &["images", "show", ids[1]]);
    assert!(shown.lines().any(|line| line.trim_start().starts_with("nginx-light  1.")), "{shown}");
}

#[test]
fn a_child_is_baked_again_when_its_parent_changed_and_plan_says_why() {
    let world = small();
    world.write("base/image.toml", "from = { name = \"small\" }\n");
    world.write(
        "web/image.toml",
        "from = \"../base\"\npackages = []\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n",
    );
    world.write("web/f", "one\n");
    // The parent comes along although only the child is named.
    let (first, _) = world.expect(0, &["bake", "web"]);
    world.write("web/f", "two\n");
    let (plan, _) = world.expect(0, &["plan", "web"]);
    assert!(plan.contains("to be baked") && plan.contains("f changed"), "{plan}");
    let (second, _) = world.expect(0, &["bake", "web"]);
    assert_ne!(first, second);
    world.write("base/image.toml", "from = { name = \"small\" }\n# changed\n");
    let (plan, _) = world.expect(0, &["plan", "web"]);
    assert!(plan.contains("parent") && plan.contains("base: to be baked"), "{plan}");
    let (third, _) = world.expect(0, &["bake", "web"]);
    assert_ne!(second, third);
    world.write("web/f", "one\n");
    world.write("base/image.toml", "from = { name = \"small\" }\n");
    assert_eq!(world.expect(0, &["bake", "web"]).0, first, "what was baked once is found again");
}

#[test]
fn four_different_ones_at_once_do_not_mix() {
    let world = small();
    let names: Vec<String> = (0..4).map(|i| format!("image{i}")).collect();
    for name in &names {
        let toml =
            format!("from = {{ name = \"small\" }}\n[[file]]\nsource = \"f\"\ntarget = \"/etc/{name}\"\n");
        world.write(&format!("{name}/image.toml"), &toml);
        world.write(&format!("{name}/f"), name);
    }
    let mut args = vec!["bake", "--jobs", "4"];
    args.extend(names.iter().map(String::as_str));
    let (out, _) = world.expect(0, &args);
    world.assert_no_traces("after four at once");
    for (line, name) in out.lines().zip(&names) {
        let (ami, family) = line.split_once('\t').unwrap();
        assert_eq!(family, name);
        let disk = ImageReader::of(&world, ami);
        for other in &names {
            let expected = (other == name).then(|| name.clone());
            assert_eq!(disk.read(&format!("/etc/{other}")), expected, "{other} in {name}");
        }
    }
}

#[test]
fn force_makes_another_image_and_the_next_bake_finds_the_newest() {
    let world = small();
    world.write("a/image.toml", "from = { name = \"small\" }\n");
    let (first, _) = world.expect(0, &["bake", "a"]);
    let (forced, _) = world.expect(0, &["bake", "--force", "a"]);
    assert_ne!(first, forced);
    assert_eq!(world.expect(0, &["bake", "a"]).0, forced);
    let (shown, _) = world.expect(0, &["images", "show", forced.trim()]);
    assert!(shown.contains("oven:forced"), "{shown}");
}

#[test]
fn a_failing_script_and_a_failing_test_make_no_image() {
    let world = small();
    for (kind, script, words) in [
        ("run", "echo the reason >&2; exit 3", ["the reason", "s.sh"]),
        ("test", "exit 1", ["test", "s.sh"]),
        (
            "run",
            "getent hosts deb.debian.org || { echo 'Temporary failure in name resolution'; exit 1; }",
            ["network = true", "s.sh"],
        ),
    ] {
        world.write(
            "a/image.toml",
            &format!("from = {{ name = \"small\" }}\n[[{kind}]]\nscript = \"s.sh\"\n"),
        );
        world.write("a/s.sh", &format!("#!/bin/sh\n{script}\n"));
        let (out, err) = world.expect(5, &["bake", "a"]);
        assert_eq!(out, "");
        assert!(words.iter().all(|word| err.contains(word)), "{err}");
        // The step, its last lines, what to do, and where to read more, each once.
        let log = err.split("Full log: ").nth(1).expect(&err).trim();
        let log = std::fs::read_to_string(log).unwrap();
        assert!(log.starts_with("oven ") && log.contains(words[0]), "{log}");
        assert_eq!(err.matches("s.sh failed").count(), 1, "{err}");
        world.assert_no_traces(script);
        let files = world.files();
        assert!(!files.iter().any(|f| f.starts_with("volumes/")), "{files:?}");
        assert_eq!(files.iter().filter(|f| f.starts_with("images/")).count(), 1);
    }
}

#[test]
fn a_preserved_disk_opens_in_a_shell_and_is_swept() {
    let world = small();
    world.write("a/image.toml", "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\n");
    world.write("a/s.sh", "#!/bin/sh\necho evidence > /root/evidence\nexit 1\n");
    let (_, err) = world.expect(5, &["bake", "--keep-on-failure", "a"]);
    let run = err.split(" shell ").nth(1).expect(&err)[..8].to_owned();
    world.assert_no_traces("kept");
    world.expect(0, &["sweep"]);
    let (out, _) = world.expect(0, &["shell", &run, "--", "cat", "/root/evidence"]);
    assert_eq!(out, "evidence\n");
    world.assert_no_traces("after the shell");
    world.expect(0, &["sweep", "--run", &run, "--kept"]);
    assert!(!world.files().iter().any(|f| f.starts_with("volumes/")), "{:?}", world.files());
}

#[test]
fn a_shell_in_an_image_changes_nothing() {
    let world = small();
    let (out, _) = world.expect(0, &["images", "list"]);
    let ami = out.split_whitespace().next().unwrap().to_owned();
    let before = world.files();
    let (out, _) = world.expect(7, &["shell", &ami, "--", "sh", "-c", "id -u; touch /changed; exit 7"]);
    assert_eq!(out, "0\n");
    world.assert_no_traces("after the shell");
    assert_eq!(before, world.files());
}

#[test]
fn mistakes_that_only_the_image_shows() {
    let world = small();
    for (packages, words) in
        [("\"no-such-package\"", ["no-such-package", "image.toml"]), ("\"tree=0.0.1*\"", ["tree", "0.0.1"])]
    {
        world.write("a/image.toml", &format!("from = {{ name = \"small\" }}\npackages = [{packages}]\n"));
        let (_, err) = world.expect(3, &["bake", "a"]);
        assert!(words.iter().all(|word| err.contains(word)), "{err}");
        world.assert_no_traces(packages);
    }
    assert_eq!(world.files().iter().filter(|f| f.starts_with("images/")).count(), 1);
}
