//! What is downloaded once is cached on this machine, and nobody but a fetch step adds to it.

use super::super::archive::{Archive, Key, SILENCE, sha256};
use super::{MAIN, lab, never_again, package, repository};
use oven::provision::package_cache::{CacheStore, LIMIT};
use oven_testing::programs::own_test;
use oven_testing::{PackageLab, pause};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const INDEX: &str = "dists/stable/main/binary";

/// A definition that asks for packages of one repository, and an image as new.
fn define(lab: &PackageLab, archive: &Archive, key: &Key, packages: &str, more: &str) {
    let repository = repository(lab, archive, "tools", key, MAIN);
    lab.define(&format!("packages = [{packages}]\n{repository}{more}"));
    lab.renew();
    fs::write(lab.image("etc/apt/sources.list"), "").unwrap();
}

/// What was answered for the last bake, without what is of no interest: which architecture it was.
fn answered(archive: &Archive) -> Vec<String> {
    let short = |path: String| match path.split_once(INDEX) {
        Some((before, _)) => format!("{before}Packages"),
        None => path,
    };
    let mut paths: Vec<_> = archive.answered().into_iter().map(short).collect();
    paths.retain(|path| !path.starts_with("404 ")); // other forms of an index
    paths.sort();
    paths.dedup();
    paths
}

/// Files below a directory: name and content's digest.
fn files(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else if let Ok(content) = fs::read(entry.path()) {
            found.push((entry.file_name().into_string().unwrap(), sha256(&content)));
        }
    }
    found.sort();
    found
}

/// The cached file of this name.
fn cached_file(lab: &PackageLab, name: &str) -> PathBuf {
    let found = Command::new("find").arg(lab.store.dir()).args(["-name", name]).output().unwrap();
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim_end())
}

fn nothing_is_in_the_image(lab: &PackageLab) {
    for dir in ["var/lib/apt/lists", "var/cache/apt"] {
        assert_eq!(files(&lab.image(dir)), [], "{dir}");
    }
}

#[test]
fn a_rebake_downloads_nothing_twice_and_sees_what_is_new_at_once() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let mut pool = vec![package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, Some(&key));
    let bake = |version: &str| {
        define(&lab, &archive, &key, "\"tool\"", "");
        let baked = lab.bake();
        let log = baked.log.clone();
        assert!(baked.facts()["packages"].contains(&format!("tool\t{version}")));
        nothing_is_in_the_image(&lab);
        log
    };
    bake("1.0");
    let all = ["200 Packages", "200 dists/stable/InRelease", "200 pool/tool_1.0_all.deb"];
    assert_eq!(answered(&archive), all);
    let log = bake("1.0");
    assert_eq!(answered(&archive), ["304 dists/stable/InRelease"], "{log}");
    assert!(log.contains("downloading 1 package and dependencies: skipped"), "{log}");

    pool.push(package(&lab, &archive, "tool", "2.0", &[]));
    archive.publish("stable", "", &pool, Some(&key));
    bake("2.0");
    let new = ["200 Packages", "200 dists/stable/InRelease", "200 pool/tool_2.0_all.deb"];
    assert_eq!(answered(&archive), new);

    // A bit flips: in a package, and then in an index.
    let flip = |file: &Path| {
        let (mut bytes, modified) =
            (fs::read(file).unwrap(), fs::metadata(file).unwrap().modified().unwrap());
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(file, bytes).unwrap();
        fs::File::options().write(true).open(file).unwrap().set_modified(modified).unwrap();
    };
    flip(&cached_file(&lab, "tool_2.0_all.deb"));
    let log = bake("2.0");
    assert!(log.contains("1 files in ") && log.contains("are damaged and are not used"), "{log}");
    assert_eq!(answered(&archive), ["200 pool/tool_2.0_all.deb", "304 dists/stable/InRelease"]);
    flip(&cached_file(&lab, "*_Packages"));
    let log = bake("2.0");
    assert!(log.contains("are damaged and are not used"), "{log}");
    assert_eq!(answered(&archive), ["200 Packages", "200 dists/stable/InRelease"]);
    assert_eq!(cached_file(&lab, "b-*"), Path::new(""), "nothing is left of what bakes worked in");
}

#[test]
fn files_of_package_code_and_scripts_are_not_cached() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let postinst = "#!/bin/sh\n\
        ls /var/cache/apt/archives > /seen\n\
        for dir in /var/cache/apt/archives /var/lib/apt/lists; do\n\
        for file in $dir/*; do echo evil >> $file; rm -f $file; chmod 777 $file; done\n\
        echo evil > $dir/evil.deb; ln -s /etc/passwd $dir/evil-link; mkdir $dir/evil\n\
        mount -o remount,rw $dir; umount $dir; echo evil > $dir/evil2.deb\n\
        done 2> /tried\n";
    let pool = [
        package(&lab, &archive, "tool", "1.0", &[("DEBIAN/postinst", postinst)]),
        package(&lab, &archive, "other", "1.0", &[]),
    ];
    archive.publish("stable", "", &pool, Some(&key));
    let script = "ls /var/lib/apt/lists > /listed\napt-get -q update\napt-get -qy install other\n\
        echo evil > /var/cache/apt/archives/script.deb\nrm -rf /var/lib/apt/lists/*";
    lab.script("work.sh", script);
    let test = "test ! -e /var/cache/apt/archives/test.deb\necho evil > /var/cache/apt/archives/test.deb";
    lab.script("test.sh", test);
    let more = "[[run]]\nscript = \"work.sh\"\nnetwork = true\n\
        [[test]]\nscript = \"test.sh\"\n[[test]]\nscript = \"test.sh\"\n";
    define(&lab, &archive, &key, "\"tool\"", more);
    let baked = lab.bake();
    assert!(!baked.log.contains("Read-only") && !baked.log.contains("W: "), "{}", baked.log);
    baked.facts();
    let tried = lab.read("tried");
    assert!(tried.contains("mount: ") && tried.contains("umount: "), "{tried}");
    assert!(lab.read("seen").contains("tool_1.0_all.deb"), "it sees what it was made of");
    assert!(lab.read("listed").contains("_InRelease"), "a script finds the index");
    assert!(lab.image("var/lib/dpkg/info/other.list").exists(), "and may add to it");
    nothing_is_in_the_image(&lab);
    let names: Vec<_> = files(lab.store.dir()).into_iter().map(|(name, _)| name).collect();
    for evil in ["evil.deb", "evil2.deb", "evil-link", "script.deb", "test.deb", "other_1.0_all.deb"] {
        assert!(!names.iter().any(|name| name == evil), "{evil} is cached: {names:?}");
    }
    let package = fs::read(archive.path(&pool[0])).unwrap();
    assert_eq!(sha256(&fs::read(cached_file(&lab, "tool_1.0_all.deb")).unwrap()), sha256(&package));

    let before = files(lab.store.dir());
    answered(&archive);
    define(&lab, &archive, &key, "\"tool\"", "");
    let baked = lab.bake();
    assert!(!baked.log.contains("are damaged and are not used"), "{}", baked.log);
    baked.facts();
    assert_eq!(answered(&archive), ["304 dists/stable/InRelease"]);
    assert_eq!(files(lab.store.dir()), before);
}

#[test]
fn other_keys_other_sources_and_another_base_have_caches_of_their_own() {
    let (mut lab, archive, key, other) = (lab(), Archive::new(), Key::new(), Key::new());
    let pool = [package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, Some(&key));
    archive.publish("testing", "", &pool, Some(&key));
    define(&lab, &archive, &key, "\"tool\"", "");
    lab.bake().facts();
    answered(&archive);
    let all = ["200 Packages", "200 dists/stable/InRelease", "200 pool/tool_1.0_all.deb"];

    // Another key does not vouch for what this one signed, whatever is cached.
    define(&lab, &archive, &other, "\"tool\"", "");
    let (_, text) = lab.bake_with(never_again).failure();
    assert!(text.contains("signed by a key that is not configured"), "{text}");
    answered(&archive);

    let repository = repository(&lab, &archive, "tools", &key, MAIN).replace("stable", "testing");
    lab.renew();
    fs::write(lab.image("etc/apt/sources.list"), "").unwrap();
    lab.define(&format!("packages = [\"tool\"]\n{repository}"));
    lab.bake().facts();
    assert!(answered(&archive).contains(&all[2].to_owned()), "other sources");

    lab.base = "snap-2".into();
    define(&lab, &archive, &key, "\"tool\"", "");
    lab.bake().facts();
    assert_eq!(answered(&archive), all, "another base");
    lab.base = "snap-1".into();
    define(&lab, &archive, &key, "\"tool\"", "");
    lab.bake().facts();
    assert_eq!(answered(&archive), ["304 dists/stable/InRelease"], "the first one's is still there");
}

#[test]
fn decompressed_packages_in_the_cache_are_verified() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let text = "what a package holds\n".repeat(8 << 10);
    let pool = [package(&lab, &archive, "large", "1:1.0", &[("usr/share/large/text", &text)])];
    archive.publish("stable", "", &pool, Some(&key));
    for _ in 0..2 {
        define(&lab, &archive, &key, "\"large\"", "");
        lab.bake().facts();
        assert_eq!(lab.read("usr/share/large/text"), text);
        nothing_is_in_the_image(&lab);
    }
    assert_eq!(answered(&archive).iter().filter(|path| path.contains("large")).count(), 1);
    let tar = cached_file(&lab, "large*.tar");
    assert!(tar.exists(), "{}", tar.display());
    // Who spoils it spoils nothing: its digest is another.
    let spoilt = fs::read(&tar)
        .unwrap()
        .iter()
        .map(|byte| if *byte == b'h' { b'H' } else { *byte })
        .collect::<Vec<_>>();
    fs::write(&tar, spoilt).unwrap();
    define(&lab, &archive, &key, "\"large\"", "");
    let baked = lab.bake();
    assert!(baked.log.contains("are damaged and are not used"), "{}", baked.log);
    baked.facts();
    assert_eq!(lab.read("usr/share/large/text"), text);
}

/// What is about a package comes from there, too; and another file of the same name is another package.
#[test]
fn unpacked_control_files_belong_to_the_installed_file() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let bake = |text: &str| {
        let script = format!("#!/bin/sh\necho {text} > /from-script\n");
        let conffiles = "/etc/tool.conf\n";
        let files = [
            ("usr/share/tool/text", text),
            ("etc/tool.conf", text),
            ("DEBIAN/postinst", script.as_str()),
            ("DEBIAN/conffiles", conffiles),
        ];
        let pool = [package(&lab, &archive, "tool", "1.0", &files)];
        archive.publish("stable", "", &pool, Some(&key));
        for again in [false, true] {
            define(&lab, &archive, &key, "\"tool\"", "");
            lab.bake().facts();
            assert_eq!(lab.read("usr/share/tool/text"), text);
            assert_eq!(lab.read("etc/tool.conf"), text);
            assert_eq!(lab.read("from-script").trim_end(), text);
            assert_eq!(lab.read("var/lib/dpkg/info/tool.conffiles"), conffiles);
            assert_eq!(lab.read("var/lib/dpkg/info/tool.postinst"), script);
            let mode =
                fs::metadata(lab.image("var/lib/dpkg/info/tool.postinst")).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o755);
            assert!(!lab.image("var/lib/dpkg/tmp.ci").exists(), "again: {again}");
            nothing_is_in_the_image(&lab);
        }
        let made = cached_file(&lab, "tool*.control");
        assert!(fs::read_to_string(made.join("postinst")).unwrap().contains(text), "{}", made.display());
    };
    bake("one");
    // apt downloads it anew because its size is another.
    bake(&"another".repeat(4 << 10));
}

/// apt itself takes a cached file for the one that it wants by its name and its size.
#[test]
fn a_file_is_used_for_as_long_as_an_index_has_it() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let tool = |text: &str| {
        let file = package(&lab, &archive, "tool", "1.0", &[("usr/share/tool/text", text)]);
        let content = fs::read(archive.path(&file)).unwrap();
        (content.len(), sha256(&content))
    };
    let of_that_size = |size: usize, texts: std::ops::Range<u32>| {
        let texts = texts.map(|text| text.to_string());
        texts.map(|text| (tool(&text), text)).find(|((len, _), _)| *len == size).expect("one of that size")
    };
    let pool = [
        "pool/tool_1.0_all.deb".to_owned(),
        package(&lab, &archive, "other", "1:1.0", &[]), // apt calls its file something else
    ];
    let bake = |packages: &str, more: &str, text: &str| {
        define(&lab, &archive, &key, packages, more);
        let baked = lab.bake();
        let log = baked.log.clone();
        baked.facts();
        assert_eq!(lab.read("usr/share/tool/text"), text, "{log}");
        nothing_is_in_the_image(&lab);
        log
    };
    let (size, first) = tool("100");
    archive.publish("stable", "", &pool, Some(&key));
    bake("\"tool\", \"other\"", "", "100");
    answered(&archive);

    let ((_, second), text) = of_that_size(size, 200..999);
    archive.publish("stable", "", &pool, Some(&key));
    bake("\"tool\", \"other\"", "", &text);
    let new = ["200 Packages", "200 dists/stable/InRelease", "200 pool/tool_1.0_all.deb"];
    assert_eq!(answered(&archive), new);
    let is_cached = |digest: &str| files(lab.store.dir()).iter().any(|(_, kept)| kept == digest);
    assert!(is_cached(&second) && !is_cached(&first), "the new one is cached, and the old one is gone");
    let log = bake("\"tool\", \"other\"", "", &text);
    assert_eq!(answered(&archive), ["304 dists/stable/InRelease"], "{log}");

    // Scripts find what is cached as well, also where a definition has no packages.
    let (_, text) = of_that_size(size, 1000..1999);
    archive.publish("stable", "", &pool, Some(&key));
    lab.script("work.sh", "apt-get -qy install tool other");
    bake("", "[[run]]\nscript = \"work.sh\"\nnetwork = true\n", &text);
    assert_eq!(answered(&archive), new);
    assert!(!is_cached(&second));
}

#[test]
fn two_at_once_and_the_next_has_what_both_downloaded() {
    let (first, archive, key) = (lab(), Archive::new(), Key::new());
    let pool = ["one", "two"].map(|name| package(&first, &archive, name, "1.0", &[]));
    archive.publish("stable", "", &pool, Some(&key));
    std::thread::scope(|scope| {
        let (archive, key, store) = (&archive, &key, &first.store);
        for package in ["\"one\"", "\"two\""] {
            scope.spawn(move || {
                let mut lab = lab();
                lab.store = store.clone();
                define(&lab, archive, key, package, "");
                lab.bake().facts();
                nothing_is_in_the_image(&lab);
            });
        }
    });
    answered(&archive);
    define(&first, &archive, &key, "\"one\", \"two\"", "");
    first.bake().facts();
    assert_eq!(answered(&archive), ["304 dists/stable/InRelease"]);
}

/// A bake that ends while it downloads: this test as a process of its own, which is killed.
#[test]
fn a_bake_that_is_killed_during_downloads_leaves_the_cache_intact() {
    if let Some(told) = std::env::var_os("OVEN_TEST_KILLED") {
        let told = PathBuf::from(told);
        let mut lab = lab();
        lab.store = CacheStore::new(&told.join("state/packages"), LIMIT);
        for name in ["image.toml", "keys/tools.asc"] {
            fs::copy(told.join("web").join(name), lab.path("web").join(name)).unwrap();
        }
        lab.bake().facts();
        unreachable!("it is killed");
    }
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let pool = ["one", "two"].map(|name| package(&lab, &archive, name, "1.0", &[]));
    archive.publish("stable", "", &pool, Some(&key));
    define(&lab, &archive, &key, "\"one\"", "");
    lab.bake().facts();
    answered(&archive);
    define(&lab, &archive, &key, "\"one\", \"two\"", "");
    archive.fail(&pool[1], SILENCE, 1);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(own_test(module_path!(), "a_bake_that_is_killed_during_downloads_leaves_the_cache_intact"))
        .env("OVEN_TEST_KILLED", lab.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !archive.asked().contains(&pool[1]) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not come to the second package");
        assert!(child.try_wait().unwrap().is_none(), "it ended before");
        pause(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let ended = Instant::now();
    while !loop_devices(&lab).is_empty() {
        assert!(ended.elapsed() < Duration::from_secs(20), "a loop device stays: {:?}", loop_devices(&lab));
        pause(Duration::from_millis(20));
    }
    assert_ne!(cached_file(&lab, "b-*"), Path::new(""), "what it worked in is left");
    answered(&archive);
    lab.bake().facts();
    assert_eq!(answered(&archive), ["200 pool/two_1.0_all.deb", "304 dists/stable/InRelease"]);
    assert_eq!(cached_file(&lab, "b-*"), Path::new(""));
}

/// Does something before the image's own apt-get, in each step that downloads.
fn hostile_apt(lab: &PackageLab, what: &str) {
    let apt = lab.image("usr/bin/apt-get");
    fs::rename(&apt, apt.with_file_name("apt-get.real")).unwrap();
    let script = format!(
        "#!/bin/sh\nif test -w /var/cache/apt/archives; then\n{what}\nfi\nexec apt-get.real \"$@\"\n"
    );
    fs::write(&apt, script).unwrap();
    fs::set_permissions(&apt, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The loop devices whose file was in the store.
fn loop_devices(lab: &PackageLab) -> Vec<String> {
    let store = lab.store.dir().to_str().unwrap().to_owned();
    let files = fs::read_dir("/sys/block").unwrap().flatten();
    let files = files.filter_map(|disk| fs::read_to_string(disk.path().join("loop/backing_file")).ok());
    files.filter(|file| file.contains(&store)).collect()
}

/// The kernel detaches a device when nothing has it open any more. Another program, such as one that lists all disks, may
/// have it open for a moment.
fn await_no_loop_device(lab: &PackageLab, when: &str) {
    oven_testing::until(&format!("{when}: the end of {:?}", loop_devices(lab)), || {
        loop_devices(lab).is_empty().then_some(())
    });
}

fn free(dir: &Path) -> (u64, u64) {
    let space = rustix::fs::statvfs(dir).unwrap();
    (space.f_bavail * space.f_frsize, space.f_favail)
}

/// A base image whose programs fill the directory for downloads.
#[test]
fn downloads_have_a_limit_for_their_size_and_their_number() {
    let files = "perl -e 'for (1..200000) { open(F, \">\", \"/var/cache/apt/archives/$_\") or last }'";
    let deep = "d=/var/lib/apt/lists; for i in $(seq 40); do d=$d/d; mkdir $d; done; \
                head -c 1G /dev/zero > $d/x 2> /dev/null";
    for (what, said) in [
        ("head -c 1G /dev/zero > /var/cache/apt/archives/x.deb", "No space left on device"),
        ("head -c 1G /dev/zero > /var/cache/apt/archives/x.deb 2> /dev/null; exit 0", ""),
        (files, ""),
        (deep, ""),
    ] {
        let (mut lab, archive, key) = (lab(), Archive::new(), Key::new());
        // On a disk that nobody else uses meanwhile, with fewer inodes than a step tries to take.
        let disk = lab.path("state");
        fs::create_dir_all(&disk).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=3g,nr_inodes=50000", "tmpfs"];
        assert!(Command::new("mount").args(options).arg(&disk).status().unwrap().success());
        // Four times as much may be downloaded: 64 MiB and 4096 files.
        lab.store = CacheStore::new(lab.store.dir(), 16 << 20);
        let pool = [package(&lab, &archive, "tool", "1.0", &[])];
        archive.publish("stable", "", &pool, Some(&key));
        define(&lab, &archive, &key, "\"tool\"", "");
        hostile_apt(&lab, what);
        fs::create_dir(lab.store.dir()).unwrap();
        fs::write(lab.store.dir().join("lock"), "").unwrap();
        let before = free(&disk);
        let baked = lab.bake();
        baked
            .fails(5, &["the downloads reached their limit of 64 MiB and 4096 files", "free some space in "]);
        assert!(baked.log.contains(said), "{what}: {}", baked.log);
        assert_eq!(files_of(&lab), ["lock"], "{what}");
        await_no_loop_device(&lab, what);
        // A directory for the key of the caches stays.
        // The kernel frees the space of the downloads' disk a moment after its loop device is gone.
        let began = Instant::now();
        let is_back = |after: (u64, u64)| after.0 + (64 << 10) >= before.0 && after.1 + 4 >= before.1;
        while !is_back(free(&disk)) {
            assert!(began.elapsed() < Duration::from_secs(60), "{what}: {before:?} {:?}", free(&disk));
            pause(Duration::from_millis(20));
        }
        assert!(Command::new("umount").arg(&disk).status().unwrap().success(), "{what}");
    }
}

/// The paths in the store, without directories of keys.
fn files_of(lab: &PackageLab) -> Vec<String> {
    let found =
        Command::new("find").arg(lab.store.dir()).args(["-type", "f", "-printf", "%f\n"]).output().unwrap();
    String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Within the limit, everything works as without it, and nothing with special rights is cached.
#[test]
fn a_hostile_base_leaves_no_special_rights_in_the_cache() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let pool = [package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, Some(&key));
    define(&lab, &archive, &key, "\"tool\"", "");
    let setxattr = libc::SYS_setxattr;
    hostile_apt(
        &lab,
        &format!(
            "cd /var/cache/apt/archives; cp /bin/true su.deb; cp /bin/true ping.deb; chown 33:33 su.deb; chmod 6777 su.deb\n\
             perl -e '($f, $n, $v) = (\"ping.deb\", \"security.capability\", pack(\"V5\", 0x02000001, 0x2000, 0, 0, 0)); \
             syscall({setxattr}, $f, $n, $v, 20, 0) == 0 or die $!'\n\
             mkdir -p open; chmod 7777 open; ln -sf /etc/shadow link.deb; mkfifo fifo.deb 2> /dev/null; cd /"
        ),
    );
    let baked = lab.bake();
    assert!(!baked.log.contains("have no limit"), "{}", baked.log);
    baked.facts();
    await_no_loop_device(&lab, "after the bake");
    let find = |arguments: &[&str]| {
        let found = Command::new("find").arg(lab.store.dir()).args(arguments).output().unwrap();
        String::from_utf8(found.stdout).unwrap()
    };
    assert_eq!(find(&["-not", "-type", "l", "-perm", "/7022"]), "", "special modes");
    assert_eq!(find(&["-type", "f", "-not", "-user", "0"]), "", "owners");
    assert_eq!(find(&["-not", "-type", "f", "-not", "-type", "d", "-not", "-type", "l"]), "", "others");
    let su = cached_file(&lab, "su.deb");
    assert!(su.exists(), "it is cached, without its rights");
    for file in ["su.deb", "ping.deb"] {
        let mut names = [0_u8; 256];
        let len = rustix::fs::llistxattr(cached_file(&lab, file), &mut names[..]).unwrap();
        assert!(!String::from_utf8_lossy(&names[..len]).contains("capability"), "{file}");
    }
}
