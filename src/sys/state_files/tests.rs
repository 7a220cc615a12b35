use super::*;
use std::os::unix::fs::symlink;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn directories_and_files_are_private() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("a/b");
    create_dir(&dir).unwrap();
    assert_eq!((mode(&dir), mode(&top.path().join("a"))), (0o700, 0o700));
    // An older oven made them with the modes that the umask permitted.
    chmod(&dir, 0o755);
    create_dir(&dir).unwrap();
    assert_eq!(mode(&dir), 0o700);
    let file = dir.join("f");
    fs::write(&file, "old").unwrap();
    chmod(&file, 0o644);
    open_file(&file, OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND).unwrap();
    assert_eq!((mode(&file), fs::read_to_string(&file).unwrap().as_str()), (0o600, "old"));
    drop(open_file(&dir.join("new"), OFlags::RDWR | OFlags::CREATE).unwrap());
    assert_eq!(mode(&dir.join("new")), 0o600);
    let missing = open_file(&dir.join("none"), OFlags::RDWR).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[test]
fn links_and_other_kinds_are_refused_and_not_changed() {
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name);
    fs::create_dir(at("victim")).unwrap();
    fs::write(at("victim/passwd"), "root").unwrap();
    chmod(&at("victim"), 0o755);
    chmod(&at("victim/passwd"), 0o644);
    symlink(at("victim"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    symlink(at("victim/passwd"), at("file-link")).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for name in
        ["link", "link/", "link//", "link/.", "dangling", "dangling/", "file-link", "fifo", "victim/passwd"]
    {
        for refused in [create_dir(&at(name)), examine_dir(&at(name))] {
            let error = refused.unwrap_err();
            assert!(error.to_string().ends_with("is a link or a file, not a directory"), "{name}: {error:#}");
            assert_eq!(Kind::of(&error), Kind::Machine, "{name}");
        }
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
    for name in ["link", "dangling", "file-link", "fifo", "victim"] {
        assert!(open_file(&at(name), flags).is_err(), "{name}");
    }
    assert_eq!((mode(&at("victim")), mode(&at("victim/passwd"))), (0o755, 0o644));
    assert!(!at("nowhere").exists());
}

#[test]
fn a_directory_to_which_everybody_can_write_is_refused() {
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name);
    for name in ["open", "sticky"] {
        fs::create_dir(at(name)).unwrap();
    }
    chmod(&at("open"), 0o777);
    chmod(&at("sticky"), 0o1777);
    for (name, why) in [
        ("open", "is writable by everybody"),
        ("sticky", "is writable by everybody"),
        ("open/new", "open, which is writable by everybody"),
    ] {
        let error = create_dir(&at(name)).unwrap_err();
        assert!(error.to_string().ends_with(why), "{name}: {error:#}");
        assert_eq!(Kind::of(&error), Kind::Machine, "{name}");
    }
    assert_eq!((mode(&at("open")), at("open/new").exists()), (0o777, false));
    create_dir(&at("sticky/new")).unwrap();
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    if !geteuid().is_root() {
        return;
    }
    let top = tempfile::tempdir().unwrap();
    let (dir, file) = (top.path().join("d"), top.path().join("f"));
    assert_eq!(foreign_owner(&top.path().metadata().unwrap()), None);
    fs::create_dir(&dir).unwrap();
    fs::write(&file, "theirs").unwrap();
    for path in [&dir, &file] {
        std::os::unix::fs::chown(path, Some(12345), None).unwrap();
    }
    let error = create_dir(&dir).unwrap_err();
    assert!(error.to_string().contains("belongs to user 12345"), "{error:#}");
    let error = open_file(&file, OFlags::WRONLY | OFlags::APPEND).unwrap_err();
    assert!(error.to_string().contains("belongs to user 12345"), "{error}");
}

#[test]
fn the_newest_files_with_an_extension_stay() {
    let dir = tempfile::tempdir().unwrap();
    for (name, age) in [("a.log", 3), ("b.log", 1), ("c.log", 2), ("d.txt", 9)] {
        let file = File::create(dir.path().join(name)).unwrap();
        file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
    }
    for _ in 0..2 {
        remove_oldest(dir.path(), "log", 2);
        let left: Vec<_> = ["a.log", "b.log", "c.log", "d.txt"]
            .into_iter()
            .filter(|name| dir.path().join(name).exists())
            .collect();
        assert_eq!(left, ["b.log", "c.log", "d.txt"]);
    }
}

#[test]
fn a_time_is_the_first_only_once() {
    let state = tempfile::tempdir().unwrap();
    let first = |name| is_first_time(state.path(), name);
    assert_eq!([first("a"), first("a"), first("b"), first("b")], [true, false, true, false]);
    assert_eq!((mode(&state.path().join("hints")), mode(&state.path().join("hints/a"))), (0o700, 0o600));
    // If the state cannot be written, a hint would be shown in every bake.
    assert!(!is_first_time(&state.path().join("hints/a"), "a"));
}
