use super::*;
use crate::image::limits::{ReadLimits, ReadMeter};
use crate::image::remove::remove_directory;
use crate::image::walk::Walk;
use rustix::fs::{CWD, mknodat};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

/// A temporary directory. It contains the tree and, next to the tree, the directory `canary`. An operation on the tree
/// must never change or read the canary.
struct Ground {
    dir: tempfile::TempDir,
    inside: ImageTree,
}

impl Ground {
    fn new() -> Self {
        // Uses a file system in memory if there is one, because the tests create hundreds of trees.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
        for path in ["tree", "canary/sub"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(dir.path().join("canary/secret"), "host").unwrap();
        fs::write(dir.path().join("canary/sub/file"), "host").unwrap();
        let inside = ImageTree::open_dir(&dir.path().join("tree")).unwrap();
        Self { dir, inside }
    }
    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("tree").join(path)
    }
    fn canary(&self) -> BTreeMap<PathBuf, (u64, u32, i64, i64)> {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.dir.path().join("canary")];
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
            found.insert(path, (meta.len(), meta.mode(), meta.ctime(), meta.ctime_nsec()));
        }
        found
    }
}

/// Creates a hostile object as `etc/x`. Operations use it as a parent and as the object itself.
type Plant = fn(&Ground);

const HOSTILE: &[(&str, Plant)] = &[
    ("absolute symlink to the host's directory", |g| {
        symlink(g.dir.path().join("canary"), g.at("etc/x")).unwrap()
    }),
    ("absolute symlink to the host's file", |g| {
        symlink(g.dir.path().join("canary/secret"), g.at("etc/x")).unwrap()
    }),
    ("relative symlink out of the tree", |g| symlink("../../canary", g.at("etc/x")).unwrap()),
    ("many dots", |g| symlink("../".repeat(40) + "canary", g.at("etc/x")).unwrap()),
    ("a loop", |g| symlink("x", g.at("etc/x")).unwrap()),
    ("a loop of two", |g| {
        symlink("y", g.at("etc/x")).unwrap();
        symlink("x", g.at("etc/y")).unwrap();
    }),
    ("a long chain", |g| {
        (0..42).for_each(|i| symlink(format!("c{}", i + 1), g.at(&format!("etc/c{i}"))).unwrap());
        symlink("c0", g.at("etc/x")).unwrap();
    }),
    ("a magic link to the host's root", |g| symlink("/proc/1/root/etc", g.at("etc/x")).unwrap()),
    ("a magic link to a descriptor", |g| symlink("/proc/self/fd/0", g.at("etc/x")).unwrap()),
    ("a symlinked parent", |g| {
        symlink(g.dir.path().join("canary"), g.at("up")).unwrap();
        symlink("/up/sub", g.at("etc/x")).unwrap();
    }),
    ("a FIFO", |g| mknodat(CWD, g.at("etc/x"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap()),
    ("a socket", |g| drop(std::os::unix::net::UnixListener::bind(g.at("etc/x")).unwrap())),
    ("a directory", |g| fs::create_dir(g.at("etc/x")).unwrap()),
    ("a dangling symlink", |g| symlink("/nowhere/at/all", g.at("etc/x")).unwrap()),
    ("a hard link", |g| {
        fs::write(g.at("etc/own"), "own").unwrap();
        fs::hard_link(g.at("etc/own"), g.at("etc/x")).unwrap();
    }),
    ("a file without permissions", |g| {
        fs::write(g.at("etc/x"), "").unwrap();
        fs::set_permissions(g.at("etc/x"), fs::Permissions::from_mode(0o000)).unwrap();
    }),
];

#[test]
fn no_hostile_tree_reaches_the_host() {
    // Each operation is tried on each hostile object, and on a path below each hostile object.
    type Operation = (&'static str, fn(&ImageTree, &str));
    let operations: &[Operation] = &[
        ("read", |i, p| assert_ne!(i.read(p).ok().flatten().as_deref(), Some(&b"host"[..]))),
        ("exists", |i, p| drop(i.exists(p))),
        ("metadata", |i, p| drop(i.metadata(p))),
        ("read_link", |i, p| drop(i.read_link(p))),
        ("list", |i, p| {
            assert!(i.list(p).is_ok_and(|l| l.iter().all(|n| n != "secret")) || i.list(p).is_err())
        }),
        ("write", |i, p| drop(i.write(p, b"new", 0o644, 0, 0))),
        ("write_from", |i, p| drop(i.write_from(p, &mut File::open("/dev/null").unwrap(), 0o600, 0, 0))),
        ("remove", |i, p| drop(i.remove(p))),
        ("truncate", |i, p| drop(i.truncate(p))),
        ("create_dir_all", |i, p| drop(i.create_dir_all(p, 0o755))),
        ("empty", |i, p| drop(i.remove_tree_content(p, &|_| false))),
        ("walk", |i, p| {
            drop(i.walk(p, &mut |path, _| {
                assert!(!path.contains("secret"));
                Ok(Walk::On)
            }))
        }),
    ];
    for (plant_name, plant) in HOSTILE {
        for (operation_name, operation) in operations {
            for path in ["/etc/x", "etc/x/sub/file", "/../etc/x/secret", "/etc"] {
                let ground = Ground::new();
                fs::create_dir(ground.at("etc")).unwrap();
                plant(&ground);
                let before = ground.canary();
                operation(&ground.inside, path);
                assert_eq!(before, ground.canary(), "{operation_name} of {path} with {plant_name}");
            }
        }
    }
}

#[test]
fn an_absolute_symlink_means_the_trees_own_root() {
    let ground = Ground::new();
    fs::create_dir_all(ground.at("etc")).unwrap();
    fs::create_dir_all(ground.at("run/resolver")).unwrap();
    fs::write(ground.at("run/resolver/conf"), "own").unwrap();
    symlink("/run/resolver/conf", ground.at("etc/resolv.conf")).unwrap();
    symlink("/run", ground.at("var-run")).unwrap();
    let inside = &ground.inside;
    assert_eq!(inside.read("/etc/resolv.conf").unwrap().unwrap(), b"own");
    assert_eq!(inside.read("../../var-run/resolver/../resolver/conf").unwrap().unwrap(), b"own");
    assert_eq!(inside.read_link("/etc/resolv.conf").unwrap().unwrap(), "/run/resolver/conf");
    assert!(inside.metadata("/etc/resolv.conf").unwrap().unwrap().st_mode & 0o170_000 == 0o120_000);
    assert_eq!(inside.list("/var-run").unwrap(), ["resolver"]);
    assert!(inside.list("/none").unwrap().is_empty() && inside.read("/etc/resolv.conf/x").unwrap().is_none());

    // A write replaces the link, and does not touch its target.
    inside.write("/etc/resolv.conf", b"new", 0o644, 0, 0).unwrap();
    assert_eq!(fs::read(ground.at("etc/resolv.conf")).unwrap(), b"new");
    assert_eq!(fs::read(ground.at("run/resolver/conf")).unwrap(), b"own");
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let ground = Ground::new();
    mknodat(CWD, ground.at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    let error = ground.inside.read("/fifo").unwrap_err().to_string();
    assert_eq!(error, "/fifo in the image is not a regular file but a FIFO");
    assert!(!ground.inside.truncate("/fifo").unwrap() && ground.inside.exists("/fifo").unwrap());
    assert!(ground.inside.remove("/fifo").unwrap() && !ground.inside.remove("/fifo").unwrap());
    let large = File::create(ground.at("large")).unwrap();
    large.set_len(READ_MAX + 1).unwrap();
    assert!(ground.inside.read("/large").unwrap_err().to_string().contains("larger than 16 MiB"));
    assert_eq!(ground.inside.read_start("/large", 4).unwrap().unwrap(), [0; 4]);
    assert!(ground.inside.truncate("/large").unwrap());
    assert_eq!(ground.inside.read("/large").unwrap().unwrap(), b"");
}

#[test]
fn modes_parents_and_no_temporary_files() {
    let ground = Ground::new();
    let inside = &ground.inside;
    let old = rustix::process::umask(Mode::from_raw_mode(0o077));
    inside.write("/opt/a/b/tool", b"x", 0o4755, 0, 0).unwrap();
    inside.create_dir_all("/srv/y", 0o1777).unwrap();
    rustix::process::umask(old);
    let mode = |path: &str| fs::metadata(ground.at(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("opt/a/b/tool"), mode("opt/a"), mode("srv/y")), (0o4755, 0o755, 0o1777));
    assert_eq!(inside.list("/opt/a/b").unwrap(), ["tool"]);
    fs::create_dir(ground.at("opt/a/dir")).unwrap();
    assert!(inside.write("/opt/a/dir", b"x", 0o644, 0, 0).is_err());
    assert_eq!(inside.list("/opt/a").unwrap(), ["b", "dir"], "the temporary file is removed");
    for path in ["/", "", "/a/../b", ".."] {
        assert!(inside.write(path, b"x", 0o644, 0, 0).is_err(), "{path}");
    }
    assert!(inside.create_dir_all("/opt/a/b/tool/x", 0o755).unwrap_err().to_string().contains("tool"));
    symlink("/gone", ground.at("dangling")).unwrap();
    let error = inside.write("/dangling/x", b"x", 0o644, 0, 0).unwrap_err().to_string();
    assert!(error.contains("/dangling in the image is a symlink to "), "{error}");
}

#[test]
fn emptying_leaves_what_the_caller_excludes() {
    let ground = Ground::new();
    for path in ["var/log/apt", "var/log/journal/id", "var/log/keep/deep", "var/log/empty"] {
        fs::create_dir_all(ground.at(path)).unwrap();
        fs::write(ground.at(path).join("f"), "x").unwrap();
    }
    symlink(ground.dir.path().join("canary"), ground.at("var/log/link")).unwrap();
    fs::write(ground.at("var/log/odd\u{1}name"), "").unwrap();
    let before = ground.canary();
    let asked = RefCell::new(Vec::new());
    let keep = |path: &str| {
        asked.borrow_mut().push(path.to_owned());
        path == "/var/log/keep/deep" || path == "/var/log/apt/f"
    };
    assert_eq!(ground.inside.remove_tree_content("/var/log/", &keep).unwrap(), 7);
    assert_eq!(ground.inside.list("/var/log").unwrap(), ["apt", "keep"]);
    assert!(ground.at("var/log/keep/deep/f").exists() && ground.at("var/log/apt/f").exists());
    assert!(asked.borrow().contains(&"/var/log/link".to_owned()));
    symlink("log", ground.at("var/lnk")).unwrap();
    assert_eq!(ground.inside.remove_tree_content("/var/lnk", &|_| false).unwrap(), 0);
    assert_eq!(ground.inside.remove_tree_content("/none", &|_| false).unwrap(), 0);
    assert_eq!(before, ground.canary());
}

/// The depth of a tree whose paths are longer than the kernel permits. A process cannot have so many open descriptors.
const DEPTH: usize = 3000;

fn deep(ground: &Ground) {
    let mut dir = rustix::fs::openat(CWD, ground.at(""), OFlags::PATH, Mode::empty()).unwrap();
    for _ in 0..DEPTH {
        fs::write(format!("/proc/self/fd/{}/file", dir.as_raw_fd()), "x").unwrap();
        rustix::fs::mkdirat(&dir, "d", Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, "d", OFlags::PATH, Mode::empty()).unwrap();
    }
}

#[test]
fn a_tree_of_any_depth_is_walked_and_removed() {
    let ground = Ground::new();
    deep(&ground);
    let (mut files, mut deepest) = (0, 0);
    let walked = ground.inside.walk("/", &mut |path, stat| {
        files += usize::from(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        deepest = deepest.max(path.len());
        Ok(Walk::On)
    });
    walked.unwrap();
    assert_eq!((files, deepest), (DEPTH, 2 * (DEPTH - 1) + "/file".len()));
    assert_eq!(
        ground.inside.remove_tree_content("/", &|path| path == "/file").unwrap(),
        2 * DEPTH as u64 - 1
    );
    assert_eq!(ground.inside.list("/").unwrap(), ["file"]);
    deep(&ground);
    remove_directory(&ground.at(""), &|| false).unwrap();
    assert!(!ground.at("").exists());
}

/// Each directory has 500 subdirectories, and the names of all would need more memory than the limit.
#[test]
fn a_removal_needs_little_memory() {
    let ground = Ground::new();
    // A file system in memory lists the newest names first, and the removal begins with the last ones.
    let mut path = "top".to_owned();
    fs::create_dir_all(ground.at(&format!("top{}", "/0".repeat(10)))).unwrap();
    for _ in 0..10 {
        (0..500).for_each(|n| fs::create_dir_all(ground.at(&format!("{path}/{n:0>200}"))).unwrap());
        path += "/0";
    }
    let small = limited(&ground, ReadLimits { names: 500_000, ..ReadLimits::default() });
    assert_eq!(small.remove_tree_content("/", &|_| false).unwrap(), 5011);
    assert!(small.list("/").unwrap().is_empty());

    deep(&ground);
    let small = limited(&ground, ReadLimits { names: 50_000, ..ReadLimits::default() });
    let error = format!("{:#}", small.remove_tree_content("/", &|_| false).unwrap_err());
    assert!(error.contains("need more than 50000 bytes"), "{error}");
    ground.inside.remove_tree_content("/", &|_| false).unwrap();
    (0..2000).for_each(|n| fs::write(ground.at(&n.to_string()), "").unwrap());
    let error = format!("{:#}", small.remove_tree_content("/", &|_| true).unwrap_err());
    assert!(error.contains("need more than 50000 bytes"), "{error}");
}

#[test]
fn the_names_and_the_paths_of_a_walk_have_limits() {
    let ground = Ground::new();
    let walk = |limits: ReadLimits, visited: &mut usize| {
        let walked = limited(&ground, limits).walk("/", &mut |_, _| {
            *visited += 1;
            Ok(Walk::On)
        });
        walked.map_err(|error| format!("{error:#}"))
    };
    // Only the names at and above the current directory count, so the second number is the sum of two directories.
    (0..20).for_each(|n| fs::create_dir_all(ground.at(&format!("{n:0>100}/{n:0>100}"))).unwrap());
    let mut visited = 0;
    let names = |names| ReadLimits { names, ..ReadLimits::default() };
    walk(names(3500), &mut visited).unwrap();
    assert_eq!(visited, 40);
    assert!(walk(names(2900), &mut visited).unwrap_err().contains("has too many names"));
    ground.inside.remove_tree_content("/", &|_| false).unwrap();

    deep(&ground);
    walk(ReadLimits::default(), &mut visited).unwrap();
    let error = walk(names(200_000), &mut visited).unwrap_err();
    assert!(error.contains("has too many names"), "{error}");
    let error = walk(ReadLimits { path: 500, ..ReadLimits::default() }, &mut visited).unwrap_err();
    assert!(error.ends_with("/d/d in the image is longer than 500 bytes"), "{error}");
    let error = walk(ReadLimits { path: 5000, ..ReadLimits::default() }, &mut visited).unwrap_err();
    assert_eq!(error, "/… (a path of 5002 bytes) in the image is longer than 5000 bytes");
    remove_directory(&ground.at(""), &|| false).unwrap();
}

#[test]
fn names_cannot_forge_lines_of_an_error() {
    let ground = Ground::new();
    let name = "x\n  Full log: y";
    fs::create_dir(ground.at(name)).unwrap();
    fs::create_dir(ground.at(name).join("dir")).unwrap();
    fs::write(ground.at(name).join("large"), [b'x'; 2000]).unwrap();
    let path = format!("/{name}/large");
    let names = |names| limited(&ground, ReadLimits { names, ..ReadLimits::default() });
    let little = limited(&ground, ReadLimits { content: 100, ..ReadLimits::default() });
    let stop = ImageTree::with_meter(
        rustix::fs::openat(CWD, ground.at(""), OFlags::PATH, Mode::empty()).unwrap(),
        ReadMeter::new(ReadLimits::default(), || true),
    );
    let remove = |entry: &crate::image::walk::WalkEntry<'_>| entry.remove().map(|()| Walk::On);
    for (what, error) in [
        ("read_at_most", ground.inside.read_at_most(&path, 1024).map(drop)),
        ("list", names(80).list(&format!("/{name}")).map(drop)),
        ("walk", names(200).walk("/", &mut |_, _| Ok(Walk::On))),
        ("remove", ground.inside.walk_entries("/", &mut |entry| remove(entry))),
        ("directory", stop.directory(&path).map(drop)),
        ("kind_of", stop.kind_of(&path).map(drop)),
        ("version", stop.version(&path).map(drop)),
        ("expand", stop.expand(&format!("/{name}/*")).map(drop)),
        ("remove_tree_content", stop.remove_tree_content(&format!("/{name}"), &|_| false).map(drop)),
        ("read", little.read(&path).map(drop)),
    ] {
        let error = format!("{:#}", error.expect_err(what));
        assert!(error.contains("x\\n  Full log: y") && !error.contains('\n'), "{what}: {error}");
    }
}

#[test]
fn a_walk_is_in_the_order_of_names_and_returns_from_each_directory() {
    let ground = Ground::new();
    for path in ["a/b/c", "a/d", "b/a/a", "b/b", "b/c/x/y"] {
        fs::create_dir_all(ground.at(path)).unwrap();
    }
    let mut visited = Vec::new();
    let walked = ground.inside.walk("/", &mut |path, _| {
        visited.push(path.to_owned());
        Ok(if path == "/b/c" { Walk::Past } else { Walk::On })
    });
    walked.unwrap();
    assert_eq!(visited, ["/a", "/a/b", "/a/b/c", "/a/d", "/b", "/b/a", "/b/a/a", "/b/b", "/b/c"]);
}

/// While a tree is walked, somebody moves the current directory out of it. The walk must not go on outside.
#[test]
fn a_directory_that_is_moved_away_ends_a_walk() {
    let ground = Ground::new();
    fs::create_dir_all(ground.at("a/b/c/d")).unwrap();
    fs::write(ground.at("a/z"), "").unwrap();
    let before = ground.canary();
    let walked = ground.inside.walk("/", &mut |path, _| {
        assert!(!path.contains("secret"), "{path}");
        if path.ends_with("/d") {
            fs::rename(ground.at("a/b/c"), ground.dir.path().join("canary/c")).unwrap();
        }
        Ok(Walk::On)
    });
    let error = format!("{:#}", walked.unwrap_err());
    assert!(error.contains("another process moved the directory"), "{error}");
    fs::remove_dir(ground.dir.path().join("canary/c/d")).unwrap();
    fs::remove_dir(ground.dir.path().join("canary/c")).unwrap();
    assert!(ground.canary().keys().eq(before.keys()));
}

#[test]
fn a_link_in_place_of_a_directory_is_not_emptied() {
    let ground = Ground::new();
    symlink(ground.dir.path().join("canary"), ground.at("link")).unwrap();
    let before = ground.canary();
    assert!(remove_directory(&ground.at("link"), &|| false).is_err());
    fs::create_dir(ground.at("dir")).unwrap();
    symlink(ground.dir.path().join("canary"), ground.at("dir/link")).unwrap();
    remove_directory(&ground.at("dir"), &|| false).unwrap();
    assert_eq!(before, ground.canary());
}

#[test]
fn what_cannot_be_removed_is_named_and_the_rest_is_removed() {
    let ground = Ground::new();
    for path in ["dir/a/x", "dir/b/x", "dir/c"] {
        fs::create_dir_all(ground.at(path)).unwrap();
    }
    let error =
        |stops: &dyn Fn() -> bool| format!("{:#}", remove_directory(&ground.at("dir"), stops).unwrap_err());
    assert!(error(&|| true).ends_with("interrupted"), "{}", error(&|| true));
    assert!(ground.at("dir/c").exists());
    // Even root cannot remove an immutable file. A file system in memory may not support this attribute.
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join("top").join(path);
    for path in ["a/x", "b/x", "c"] {
        fs::create_dir_all(at(path)).unwrap();
    }
    fs::write(at("b/x/stays"), "").unwrap();
    fs::write(at("b/x/goes"), "").unwrap();
    let change = |how: &str| {
        std::process::Command::new("chattr").arg(how).arg(at("b/x/stays")).status().is_ok_and(|s| s.success())
    };
    if change("+i") {
        let removed = remove_directory(&at(""), &|| false);
        assert!(change("-i"));
        let error = format!("{:#}", removed.unwrap_err());
        assert!(error.contains("/b/x/stays: Operation not permitted"), "{error}");
        let left =
            |path: &str| fs::read_dir(at(path)).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!((left(""), left("b/x")), (vec!["b".into()], vec!["stays".into()]));
    }
}

fn limited(ground: &Ground, limits: ReadLimits) -> ImageTree {
    let dir = rustix::fs::openat(CWD, ground.at(""), OFlags::PATH, Mode::empty()).unwrap();
    ImageTree::with_meter(dir, ReadMeter::new(limits, || false))
}

#[test]
fn everything_that_is_read_counts() {
    let ground = Ground::new();
    for number in 0..20 {
        fs::write(ground.at(&number.to_string()), "xxxxx").unwrap();
    }
    let content = limited(&ground, ReadLimits { content: 12, ..ReadLimits::default() });
    assert_eq!(content.read("/0").unwrap().unwrap(), b"xxxxx");
    assert_eq!(content.read_text("/1").unwrap(), "xxxxx");
    for failed in [content.read("/2").unwrap_err(), content.read_text("/3").unwrap_err()] {
        assert!(format!("{failed:#}").contains("have more than"), "{failed:#}");
        assert_eq!(crate::error::Kind::of(&failed), crate::error::Kind::Definition);
    }
    fs::write(ground.at("large"), [b'x'; 1025]).unwrap();
    assert_eq!(ground.inside.read_at_most("/large", 1025).unwrap().unwrap().len(), 1025);
    let error = ground.inside.read_at_most("/large", 1024).unwrap_err();
    assert_eq!(error.to_string(), "/large in the image is larger than 1 KiB");
    assert_eq!(crate::error::Kind::of(&error), crate::error::Kind::Definition);
    ground.inside.meter().note_step();
    let error = ground.inside.read_at_most("/large", 1024).unwrap_err();
    assert_eq!(crate::error::Kind::of(&error), crate::error::Kind::Step);
}

#[test]
fn a_stop_ends_every_read() {
    let ground = Ground::new();
    fs::write(ground.at("file"), "x").unwrap();
    let dir = rustix::fs::openat(CWD, ground.at(""), OFlags::PATH, Mode::empty()).unwrap();
    let inside = ImageTree::with_meter(dir, ReadMeter::new(ReadLimits::default(), || true));
    for (what, ended) in [
        ("read", inside.read("/file").map(drop)),
        ("list", inside.list("/").map(drop)),
        ("walk", inside.walk("/", &mut |_, _| Ok(Walk::On))),
        ("expand", inside.expand("/*").map(drop)),
        ("metadata", inside.metadata("/file").map(drop)),
        ("remove", inside.remove_tree_content("/", &|_| false).map(drop)),
    ] {
        assert_eq!(
            crate::error::Kind::of(&ended.expect_err(what)),
            crate::error::Kind::Interrupted,
            "{what}"
        );
    }
}
