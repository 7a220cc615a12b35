use super::manifest::{CacheEntry, CacheTree};
use super::session::CacheSession;
use super::store::CacheStore;
use super::*;
use crate::image::test::Tree;
use oven_distro::{Holds, Step};
use std::fs;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use tempfile::TempDir;

struct Lab {
    dir: TempDir,
    overlays: bool,
    limit: u64,
}

const LISTS: usize = 0;
const ARCHIVES: usize = 1;

impl Lab {
    fn all() -> Vec<Self> {
        let lab = |overlays| Self { dir: tempfile::tempdir().unwrap(), overlays, limit: u64::MAX };
        vec![lab(false), lab(true)]
    }

    fn open(&self, key: &str) -> CacheSession {
        let cache = |holds| Cache { path: "/var/cache/x".into(), holds, sources: vec!["/etc/x".into()] };
        let id = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let directory = |mode| CacheEntry::Directory { mode, uid: id, gid };
        let seed =
            || CacheTree::from([(String::new(), directory(0o755)), ("partial".into(), directory(0o700))]);
        let caches = [cache(Holds::Indexes), cache(Holds::Packages)];
        let store = CacheStore::new(&self.dir.path().join("store"), self.limit);
        CacheSession::open(&store, key, &caches, vec![seed(), seed()], self.overlays).unwrap()
    }

    /// Returns the content that a bake sees, computed without an overlay mount.
    fn sees(&self, working: &CacheSession, cache: usize) -> Vec<(String, String)> {
        let layers = &working.layers()[cache];
        let mut seen: std::collections::BTreeMap<String, String> = Default::default();
        for dir in layers.lower.iter().chain([&layers.upper]) {
            for path in walk(dir) {
                let at = dir.join(&path);
                if fs::metadata(&at).unwrap().is_file() {
                    seen.insert(path, fs::read_to_string(at).unwrap());
                } else {
                    seen.remove(&path);
                }
            }
        }
        seen.into_iter().collect()
    }

    fn stored(&self) -> Vec<String> {
        let store = self.dir.path().join("store");
        let mut names: Vec<_> =
            walk(&store).into_iter().map(|p| p.split('/').next().unwrap().into()).collect();
        names.dedup();
        names
    }
}

/// Returns the paths of all objects except directories, sorted.
fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
        } else {
            found.push(name);
        }
    }
    found.sort();
    found
}

fn write(working: &CacheSession, cache: usize, name: &str, content: &str) {
    fs::write(working.layers()[cache].upper.join(name), content).unwrap();
}

fn pair(name: &str, content: &str) -> (String, String) {
    (name.to_owned(), content.to_owned())
}

#[test]
fn the_next_bake_finds_what_was_published_and_nothing_else() {
    for lab in Lab::all() {
        let mut first = lab.open("k");
        assert_eq!((first.cached_bytes, first.damaged), (0, 0));
        assert!(first.layers()[LISTS].upper.join("partial").is_dir());
        write(&first, LISTS, "InRelease", "signed");
        write(&first, ARCHIVES, "tree.deb", "tree");
        assert_eq!(first.publish().unwrap(), 10);
        write(&first, ARCHIVES, "late.deb", "from a script");
        let upper = first.layers()[ARCHIVES].upper.join("tree.deb");
        if upper.exists() {
            fs::write(upper, "changed by a script").unwrap();
        }
        drop(first);
        let mut second = lab.open("k");
        assert_eq!((second.cached_bytes, second.damaged), (10, 0));
        assert_eq!(lab.sees(&second, LISTS), [pair("InRelease", "signed")]);
        assert_eq!(lab.sees(&second, ARCHIVES), [pair("tree.deb", "tree")]);
        assert_eq!(second.publish().unwrap(), 0, "nothing came");
        assert_eq!(lab.open("other").cached_bytes, 0);
        drop(second);
        assert_eq!(lab.stored(), ["k", "lock"], "working directories are removed");
    }
}

/// The directories have paths of up to 100 KB, which have 25 MB together.
#[test]
fn a_deep_directory_of_the_image_is_not_taken_over() {
    let tree = Tree::new();
    tree.deep_file(&"d".repeat(200), 500, "");
    let error = read_seed(&tree.tree(), "/").unwrap_err();
    assert_eq!(error.to_string(), "the paths below / in the image have more than 16 MiB together");
    assert_eq!(Kind::of(&error), Kind::Definition);
}

#[test]
fn a_bit_that_flipped_is_not_served() {
    for lab in Lab::all() {
        for spoil in ["InRelease", "tree.deb", "nginx.deb"] {
            let key = spoil.replace('.', "");
            let mut first = lab.open(&key);
            write(&first, LISTS, "InRelease", "signed");
            write(&first, LISTS, "Packages", "tree nginx");
            write(&first, ARCHIVES, "tree.deb", "tree");
            write(&first, ARCHIVES, "nginx.deb", "nginx");
            first.publish().unwrap();
            drop(first);
            let stored = lab.dir.path().join("store").join(&key).join("1");
            let file = walk(&stored).into_iter().find(|path| path.ends_with(spoil)).unwrap();
            let before = fs::metadata(stored.join(&file)).unwrap().len();
            let modified = fs::metadata(stored.join(&file)).unwrap().modified().unwrap();
            let mut bytes = fs::read(stored.join(&file)).unwrap();
            bytes[1] ^= 4;
            fs::write(stored.join(&file), bytes).unwrap();
            File::options().write(true).open(stored.join(&file)).unwrap().set_modified(modified).unwrap();
            let mut second = lab.open(&key);
            assert_eq!(second.damaged, 1, "{spoil}");
            let (lists, archives) = (lab.sees(&second, LISTS), lab.sees(&second, ARCHIVES));
            if spoil == "InRelease" {
                assert_eq!(lists, [], "an index is dropped as a whole");
                assert_eq!(archives.len(), 2);
            } else {
                assert_eq!(lists.len(), 2);
                let other =
                    if spoil == "tree.deb" { pair("nginx.deb", "nginx") } else { pair("tree.deb", "tree") };
                assert_eq!(archives, [other]);
            }
            // A new download of the file has the same entry as the damaged file.
            let cache = if spoil == "InRelease" { LISTS } else { ARCHIVES };
            let content = ["signed", "tree", "nginx"].into_iter().find(|c| c.len() as u64 == before).unwrap();
            let to = second.layers()[cache].upper.join(spoil);
            _ = fs::remove_file(&to);
            fs::write(&to, content).unwrap();
            File::options().write(true).open(&to).unwrap().set_modified(modified).unwrap();
            second.publish().unwrap();
            drop(second);
            assert_eq!(lab.open(&key).damaged, 0, "it was dropped");
        }
    }
}

#[test]
fn files_that_the_index_lacks_are_ignored() {
    for lab in Lab::all() {
        let mut first = lab.open("k");
        write(&first, ARCHIVES, "tree.deb", "tree");
        first.publish().unwrap();
        drop(first);
        let stored = lab.dir.path().join("store/k/1");
        fs::write(stored.join("1/planted.deb"), "planted").unwrap();
        let second = lab.open("k");
        assert_eq!(lab.sees(&second, ARCHIVES), [pair("tree.deb", "tree")]);
        drop(second);
        fs::write(stored.join("index"), "{}").unwrap();
        let mut third = lab.open("k");
        assert_eq!((third.cached_bytes, third.damaged), (0, 0), "without an index nothing is used");
        write(&third, ARCHIVES, "tree.deb", "tree");
        third.publish().unwrap();
        drop(third);
        let fourth = lab.open("k");
        assert_eq!((fourth.cached_bytes, fourth.damaged), (4, 0));
    }
}

#[test]
fn concurrent_bakes_are_merged_and_do_not_see_each_other() {
    for lab in Lab::all() {
        let mut first = lab.open("k");
        write(&first, LISTS, "InRelease", "1");
        write(&first, ARCHIVES, "old.deb", "old");
        first.publish().unwrap();
        drop(first);
        let (mut one, mut two) = (lab.open("k"), lab.open("k"));
        write(&one, ARCHIVES, "one.deb", "one");
        write(&two, ARCHIVES, "two.deb", "two");
        write(&two, LISTS, "InRelease", "2");
        assert_eq!(two.publish().unwrap(), 3);
        assert_eq!(lab.sees(&one, ARCHIVES), [pair("old.deb", "old"), pair("one.deb", "one")]);
        assert_eq!(lab.sees(&one, LISTS), [pair("InRelease", "1")]);
        assert_eq!(one.publish().unwrap(), 3);
        let all = [pair("old.deb", "old"), pair("one.deb", "one"), pair("two.deb", "two")];
        assert_eq!(lab.sees(&one, ARCHIVES), all);
        assert_eq!(lab.sees(&one, LISTS), [pair("InRelease", "2")], "the bake that changed an index wins");
        assert_eq!(lab.sees(&two, ARCHIVES), [pair("old.deb", "old"), pair("two.deb", "two")]);
    }
}

#[test]
fn steps_are_done_where_all_packages_came_with_one_index() {
    for lab in Lab::all() {
        // In the first case, both bakes have the same index. In the second case, the other bake downloads a new index.
        for (key, theirs, done) in [("same", "1", true), ("new", "2", false)] {
            let mut first = lab.open(key);
            write(&first, LISTS, "InRelease", "1");
            first.publish().unwrap();
            drop(first);
            let (mut one, mut two) = (lab.open(key), lab.open(key));
            if theirs != "1" {
                write(&two, LISTS, "InRelease", theirs);
            }
            for (working, name) in [(&mut one, "one"), (&mut two, "two")] {
                write(working, ARCHIVES, &format!("{name}.deb"), name);
                working.note_done(name.to_owned());
                working.publish().unwrap();
            }
            drop((one, two));
            let next = lab.open(key);
            assert_eq!(lab.sees(&next, LISTS), [pair("InRelease", theirs)]);
            assert_eq!(lab.sees(&next, ARCHIVES), [pair("one.deb", "one"), pair("two.deb", "two")]);
            for step in ["one", "two"] {
                assert_eq!(next.is_done(step).unwrap(), done, "{key}: {step}");
            }
        }
    }
}

#[test]
fn cached_files_have_no_special_rights() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    // VFS_CAP_REVISION_2 with CAP_NET_RAW (linux/capability.h).
    let capability = [0x0200_0001_u32, 0x2000, 0, 0, 0].map(u32::to_le_bytes).concat();
    let is_root = rustix::process::geteuid().is_root();
    for lab in Lab::all() {
        let mut first = lab.open("k");
        let upper = first.layers()[ARCHIVES].upper.clone();
        for (name, mode) in [("setuid.deb", 0o6755), ("shared.deb", 0o666), ("own.deb", 0o1600)] {
            write(&first, ARCHIVES, name, name);
            if is_root {
                std::os::unix::fs::chown(upper.join(name), Some(33), Some(33)).unwrap();
                let set = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(upper.join(name), "security.capability", &capability, set).unwrap();
            }
            fs::set_permissions(upper.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(upper.join("dir")).unwrap();
        fs::set_permissions(upper.join("dir"), fs::Permissions::from_mode(0o7777)).unwrap();
        symlink("/etc/passwd", upper.join("link.deb")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, upper.join("fifo.deb"), fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        first.publish().unwrap();
        drop(first);
        let stored = lab.dir.path().join("store/k/1").join(ARCHIVES.to_string());
        assert_eq!(walk(&stored), ["link.deb", "own.deb", "setuid.deb", "shared.deb"]);
        assert_eq!(fs::read_link(stored.join("link.deb")).unwrap(), Path::new("/etc/passwd"), "not followed");
        for (name, mode) in [("setuid.deb", 0o755), ("shared.deb", 0o644), ("own.deb", 0o600), ("dir", 0o755)]
        {
            let found = fs::symlink_metadata(stored.join(name)).unwrap();
            let owner = rustix::process::geteuid().as_raw();
            assert_eq!((found.mode() & 0o7777, found.uid()), (mode, owner), "{name}");
            let mut names = [0_u8; 256];
            let len = rustix::fs::llistxattr(stored.join(name), &mut names[..]).unwrap();
            assert!(!names[..len].starts_with(b"security.capability"), "{name}");
        }
        let second = lab.open("k");
        assert_eq!((second.damaged, lab.sees(&second, ARCHIVES).len()), (0, 4));
        drop(second);
        // What an earlier version of oven cached, or somebody changed.
        if is_root {
            let set = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(stored.join("own.deb"), "security.capability", &capability, set).unwrap();
            assert_eq!(lab.open("k").damaged, 1);
        }
        let index = lab.dir.path().join("store/k/1/index");
        let text = fs::read_to_string(&index).unwrap();
        fs::write(&index, text.replace(&format!("\"mode\":{}", 0o755), &format!("\"mode\":{}", 0o4755)))
            .unwrap();
        let third = lab.open("k");
        assert_eq!((third.cached_bytes, third.damaged), (0, 0), "an index with such files is not used");
    }
}

#[test]
fn a_killed_bake_leaves_the_last_generation_as_it_is() {
    for lab in Lab::all() {
        let mut first = lab.open("k");
        write(&first, ARCHIVES, "tree.deb", "tree");
        first.publish().unwrap();
        drop(first);
        let killed = lab.open("k");
        write(&killed, ARCHIVES, "half.deb", "ha");
        fs::create_dir_all(lab.dir.path().join("store/k/part-x/1")).unwrap();
        // A killed process loses its locks, but its working directory remains.
        let left = killed.layers()[ARCHIVES].upper.parent().unwrap().to_owned();
        let copy = lab.dir.path().join("copy");
        assert!(std::process::Command::new("cp").arg("-a").args([&left, &copy]).status().unwrap().success());
        drop(killed);
        fs::rename(&copy, &left).unwrap();
        // This bake was killed before it locked its directory.
        let early = left.with_file_name("b-early");
        fs::create_dir_all(early.join("lower")).unwrap();
        let mut next = lab.open("k");
        assert!(!left.exists() && !early.exists());
        assert_eq!(lab.sees(&next, ARCHIVES), [pair("tree.deb", "tree")]);
        write(&next, ARCHIVES, "more.deb", "more");
        next.publish().unwrap();
        drop(next);
        assert!(!lab.dir.path().join("store/k/part-x").exists());
        let generations: Vec<_> = fs::read_dir(lab.dir.path().join("store/k")).unwrap().collect();
        assert_eq!(generations.len(), 1, "old ones are removed");
    }
}

#[test]
#[allow(clippy::disallowed_methods, reason = "a thread of the test waits")]
fn the_least_recently_used_key_is_removed_unless_it_is_in_use() {
    // Directories also take space, so the files are much larger than a directory.
    let large = "0123456789".repeat(100_000);
    for mut lab in Lab::all() {
        let bake = |lab: &Lab, key: &str| {
            let mut working = lab.open(key);
            write(&working, ARCHIVES, "a.deb", &large);
            working.publish().unwrap();
            working
        };
        let age = |lab: &Lab, key: &str, seconds: u64| {
            let index = lab.dir.path().join("store").join(key).join("1/index");
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(seconds);
            File::options().write(true).open(index).unwrap().set_modified(then).unwrap();
        };
        lab.limit = 2_500_000;
        drop((bake(&lab, "a"), bake(&lab, "b")));
        age(&lab, "a", 200);
        age(&lab, "b", 100);
        let used = lab.open("a");
        age(&lab, "a", 300);
        drop(bake(&lab, "c"));
        assert_eq!(
            lab.stored().iter().filter(|n| n.len() == 1).collect::<Vec<_>>(),
            ["a", "c"],
            "a is in use"
        );
        drop(used);
        age(&lab, "a", 300);
        // One key alone exceeds this limit, so its oldest packages are removed.
        lab.limit = 1_500_000;
        let mut more = lab.open("c");
        write(&more, ARCHIVES, "b.deb", &large);
        std::thread::sleep(std::time::Duration::from_millis(5));
        more.publish().unwrap();
        drop(more);
        assert_eq!(lab.sees(&lab.open("c"), ARCHIVES), [pair("b.deb", &large)]);
        assert_eq!(lab.stored().iter().filter(|n| n.len() == 1).collect::<Vec<_>>(), ["c"]);
    }
}

/// Creates a deep tree with a file at its end. Other tests remove deeper trees in memory.
fn deep_tree(dir: &Path, content: &[u8]) {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    fs::create_dir(dir).unwrap();
    let mut at = openat(CWD, dir, OFlags::PATH, Mode::empty()).unwrap();
    for _ in 0..400 {
        mkdirat(&at, "d", Mode::RWXU).unwrap();
        at = openat(&at, "d", OFlags::PATH, Mode::empty()).unwrap();
    }
    let file = openat(&at, "file", OFlags::WRONLY | OFlags::CREATE, Mode::RWXU).unwrap();
    std::io::Write::write_all(&mut File::from(file), content).unwrap();
}

#[test]
fn a_deep_tree_of_a_bake_is_removed_and_never_cached() {
    for lab in Lab::all() {
        let mut first = lab.open("k");
        deep_tree(&first.layers()[ARCHIVES].upper.join("deep"), b"x");
        let error = first.publish().unwrap_err();
        assert!(format!("{error:#}").contains("directories deep"), "{error:#}");
        first.close().unwrap();
        assert_eq!(lab.stored(), ["lock"]);
        let dropped = lab.open("k");
        deep_tree(&dropped.layers()[ARCHIVES].upper.join("deep"), b"x");
        drop(dropped);
        assert_eq!(lab.stored(), ["lock"]);
    }
}

#[test]
fn too_many_or_too_large_files_are_not_cached() {
    let lab = Lab { dir: tempfile::tempdir().unwrap(), overlays: false, limit: u64::MAX };
    let mut working = lab.open("k");
    let upper = working.layers()[ARCHIVES].upper.clone();
    File::create(upper.join("hole")).unwrap().set_len(15 << 40).unwrap();
    let error = working.publish().unwrap_err();
    assert!(format!("{error:#}").contains("more than 16 GiB of files"), "{error:#}");
}

#[test]
fn indexes_that_exceed_the_limit_are_not_cached() {
    for mut lab in Lab::all() {
        lab.limit = 1 << 20;
        let mut working = lab.open("k");
        write(&working, LISTS, "Packages", &"x".repeat(3 << 20));
        let error = working.publish().unwrap_err();
        let told = "the package indexes have 3 MiB, and the package cache may only have 1 MiB";
        assert_eq!(format!("{error:#}"), told);
        assert_eq!(lab.sees(&working, LISTS).len(), 1, "this bake goes on with its downloads");
        working.close().unwrap();
        assert_eq!(walk(&lab.dir.path().join("store")), ["lock"]);
    }
}

#[test]
fn holes_of_downloads_take_no_space_in_the_store() {
    let lab = Lab { dir: tempfile::tempdir().unwrap(), overlays: true, limit: u64::MAX };
    let mut working = lab.open("k");
    let hole = working.layers()[ARCHIVES].upper.join("hole.deb");
    File::create(&hole).unwrap().set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(&hole).unwrap(),
        b"end",
        5 << 20,
    )
    .unwrap();
    assert_eq!(working.publish().unwrap(), 64 << 20);
    let stored = fs::metadata(working.layers()[ARCHIVES].lower.as_ref().unwrap().join("hole.deb")).unwrap();
    assert_eq!(stored.len(), 64 << 20);
    assert!(stored.blocks() * 512 <= 1 << 20, "{} blocks", stored.blocks());
    assert_eq!(lab.open("k").damaged, 0);
}

#[test]
fn a_file_that_changed_only_its_content_is_cached_again() {
    let lab = Lab { dir: tempfile::tempdir().unwrap(), overlays: false, limit: u64::MAX };
    let mut first = lab.open("k");
    write(&first, ARCHIVES, "a.deb", "old");
    first.publish().unwrap();
    let mut second = lab.open("k");
    let path = second.layers()[ARCHIVES].upper.join("a.deb");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "new").unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    second.publish().unwrap();
    let third = lab.open("k");
    assert_eq!((third.damaged, lab.sees(&third, ARCHIVES)), (0, vec![pair("a.deb", "new")]));
}

#[test]
fn a_sweep_removes_directories_of_killed_bakes_and_no_others() {
    let lab = Lab { dir: tempfile::tempdir().unwrap(), overlays: false, limit: u64::MAX };
    let store = CacheStore::new(&lab.dir.path().join("store"), u64::MAX);
    assert!(store.remove_leftovers(false).unwrap().found.is_empty());
    assert!(!store.dir().exists(), "nothing is created");
    let running = lab.open("k");
    write(&running, ARCHIVES, "a.deb", "a");
    let killed = store.dir().join("b-killed");
    deep_tree(&killed, b"x");
    let part = store.dir().join("k/part-x");
    deep_tree(&part, b"x");
    let mut expected = vec![killed.clone(), part.clone()];
    for dry_run in [true, false] {
        let mut swept = store.remove_leftovers(dry_run).unwrap();
        assert!(swept.failures.is_empty(), "{:?}", swept.failures);
        swept.found.sort();
        expected.sort();
        assert_eq!(swept.found, expected);
        assert_eq!((killed.exists(), part.exists()), (dry_run, dry_run));
    }
    assert_eq!(lab.sees(&running, ARCHIVES), [pair("a.deb", "a")], "a running bake");
}

#[test]
fn everything_in_the_store_counts_in_its_limit() {
    let large = vec![b'x'; 3_000_000];
    for leftover in ["file", "k/other", "unknown/deep"] {
        let mut lab = Lab { dir: tempfile::tempdir().unwrap(), overlays: false, limit: u64::MAX };
        let bake = |lab: &Lab, key: &str| {
            let mut working = lab.open(key);
            write(&working, ARCHIVES, "a.deb", "0123456789");
            working.publish().unwrap();
        };
        bake(&lab, "k");
        bake(&lab, "other");
        lab.limit = 2_000_000;
        bake(&lab, "last");
        let has = |key: &str| lab.dir.path().join("store").join(key).exists();
        assert!(has("k") && has("other"), "{leftover}");
        let path = lab.dir.path().join("store").join(leftover);
        match leftover {
            "unknown/deep" => {
                fs::create_dir(path.parent().unwrap()).unwrap();
                deep_tree(&path, &large);
            }
            _ => fs::write(&path, &large).unwrap(),
        }
        bake(&lab, "more");
        assert!(!has("other"), "{leftover}");
        if path.is_dir() {
            crate::image::remove::remove_directory(&path, &|| false).unwrap();
        }
    }
}

/// A plan with a step and this cache.
fn plan(path: &str, sources: &[&str]) -> Plan {
    let sources = sources.iter().map(|source| (*source).to_owned()).collect();
    let step = Step {
        phase: Phase::Fetch,
        why: "downloading 1 package".into(),
        argv: vec!["pkg".into(), "download".into()],
        env: Default::default(),
        retries: 0,
        before_retry: Vec::new(),
        network: true,
        also_good: Vec::new(),
        once: true,
        timeout: 60,
    };
    let caches = vec![Cache { path: path.into(), holds: Holds::Packages, sources }];
    Plan { steps: vec![step], caches, ..Plan::default() }
}

#[test]
fn a_directory_without_sources_is_not_cached() {
    let (dir, tree, report) = (tempfile::tempdir().unwrap(), Tree::new(), Report::silent());
    tree.file("var/cache/pkg/x", "x");
    let (inside, plan) = (tree.tree(), plan("/var/cache/pkg", &[]));
    let store = CacheStore::new(&dir.path().join("store"), u64::MAX);
    let cache = PackageCache { store, base: "snap-1".into() };
    let request = CacheRequest {
        cache: Some(&cache),
        plan: &plan,
        key: None,
        image: &inside,
        certificates: None,
        report: &report,
    };
    let wanted = CacheUse { trusted: true, fetches: true, access: CacheAccess::Write };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mounts = runtime.block_on(async { DownloadCaches::new(request).mounts(wanted).await });
    assert!(mounts.unwrap().is_empty());
    assert!(!dir.path().join("store").exists());
}

#[test]
fn only_root_may_enter_the_store() {
    use std::os::unix::fs::MetadataExt;
    let lab = &Lab::all()[0];
    drop(lab.open("k"));
    assert_eq!(fs::metadata(lab.dir.path().join("store")).unwrap().mode() & 0o777, 0o700);
}
