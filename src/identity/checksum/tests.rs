use super::*;
use rustix::fs::{CWD, Mode};
use std::os::unix::fs::symlink;

fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = top.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    top
}

/// The error's message, in which `DIR` stands for the tree's directory.
fn error(top: &Path, directory: &str) -> String {
    let error = config_checksum(&[top.join(directory)]).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Definition);
    format!("{error:#}").replace(top.to_str().unwrap(), "DIR")
}

#[test]
fn the_published_vectors_match() {
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/checksum-vectors.json")).unwrap();
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let files = case["files"].as_object().unwrap();
        let files: Vec<_> = files.iter().map(|(path, text)| (&**path, text.as_str().unwrap())).collect();
        let top = tree(&files);
        for directory in case["directories"].as_array().into_iter().flatten() {
            std::fs::create_dir(top.path().join(directory.as_str().unwrap())).unwrap();
        }
        if files.is_empty() {
            assert_eq!(error(top.path(), ""), "DIR/: no files found for the checksum");
            assert_eq!(DefinitionTree::default().checksum(), case["checksum"]);
            continue;
        }
        let answer = config_checksum(&[top.path()]).unwrap();
        assert_eq!(answer.hex, case["checksum"], "{}", case["name"]);
        if let Some(sorted) = case["sorted"].as_array() {
            let sorted: Vec<_> = sorted.iter().map(|path| top.path().join(path.as_str().unwrap())).collect();
            assert_eq!(answer.files.iter().map(|(path, _)| PathBuf::from(path)).collect::<Vec<_>>(), sorted);
        }
        if let Some(sha1) = case["file_sha1"].as_str() {
            assert_eq!(answer.files[0].1, sha1);
        }
    }
}

/// The expected values were computed with the checksum.py of GumGum's AMI Bakery, and with another implementation in
/// Python.
#[test]
fn links_hidden_directories_and_several_directories_count_as_in_the_original() {
    let top = tree(&[
        ("w/image.toml", "from\n"),
        ("w/sub/x", "x"),
        ("w/sub-x/y", "y"),
        ("w/sub.d/z", "z"),
        ("w/sub/.hidden/h", "h"),
        ("w/sub/.no", "no"),
        ("w/é", "e"),
        ("w/Z", "Z"),
        ("w/a\nb", "nl"),
        ("w/a b", "sp"),
        ("w/+plus", "plus"),
        ("c/deep/tool", "shared\n"),
        ("c/lib", "lib"),
    ]);
    symlink("../c/lib", top.path().join("w/to-file")).unwrap();
    symlink("../c", top.path().join("w/to-dir")).unwrap();
    // A hidden link without a target is ignored, so it is not an error.
    symlink("nowhere", top.path().join("w/.dangling")).unwrap();
    let checksum = |directories: &[&str]| {
        let directories: Vec<_> = directories.iter().map(|dir| top.path().join(dir)).collect();
        config_checksum(&directories).unwrap().hex
    };
    assert_eq!(checksum(&["w"]), "70bad651addfb45ea0331d4b938f0cd5b747734a");
    assert_eq!(checksum(&["w", "w/../c"]), "93cb5ae2e1fed2b69b9a671c1dc5345f879afdae");
    assert_eq!(checksum(&["c", "w"]), "6be7655351b26ec3278a4b2d528518f3629b9e51");
    // Neither the order of the directories nor a slash at the end of a path changes the checksum.
    assert_eq!(checksum(&["w/", "c/"]), "6be7655351b26ec3278a4b2d528518f3629b9e51");
}

/// The expected order of the files is that of their names as bytes (Python's os.fsencode). The expected value was
/// computed with hashlib.
#[test]
fn names_that_are_no_utf8_sort_by_their_bytes() {
    let all: Vec<u8> = (0..=255).collect();
    let top = tree(&[("b/a", "a"), ("b/é", "e")]);
    std::fs::write(top.path().join("b").join(std::ffi::OsStr::from_bytes(b"\xff\xfe")), "bytes").unwrap();
    // 3 MiB, which is several times the size of the buffer.
    std::fs::write(top.path().join("b/big"), all.repeat(4096 * 3)).unwrap();
    assert_eq!(
        config_checksum(&[top.path().join("b")]).unwrap().hex,
        "488ccba6f4fa5591aba797acd426f358604856c8"
    );
}

#[test]
fn files_that_cannot_count_are_named() {
    let top = tree(&[("dangling/a", ""), ("loop/a", ""), ("pipe/a", ""), ("socket/a", ""), ("null/a", "")]);
    std::fs::create_dir_all(top.path().join("hidden")).unwrap();
    std::fs::write(top.path().join("hidden/.a"), "").unwrap();
    symlink("nowhere", top.path().join("dangling/link")).unwrap();
    symlink("link", top.path().join("loop/link")).unwrap();
    rustix::fs::mkfifoat(CWD, top.path().join("pipe/fifo"), Mode::RWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(top.path().join("socket/listen")).unwrap();
    symlink("/dev/null", top.path().join("null/device")).unwrap();
    let cases = [
        ("dangling", "DIR/dangling/link: is a symbolic link to nowhere, which does not exist"),
        ("pipe", "DIR/pipe/fifo: is a FIFO: only regular files can be part of the checksum"),
        ("socket", "DIR/socket/listen: is a socket: only regular files can be part of the checksum"),
        ("null", "DIR/null/device: is a device: only regular files can be part of the checksum"),
        ("hidden", "DIR/hidden: no files found for the checksum"),
        ("gone", "DIR/gone: directory not found"),
        ("pipe/a", "DIR/pipe/a: is a file, not a directory"),
    ];
    for (directory, expected) in cases {
        assert_eq!(error(top.path(), directory), expected);
    }
    assert!(error(top.path(), "loop").starts_with("DIR/loop/link: cannot be read: "));
    let missing = config_checksum(&[top.path().join("gone")]).unwrap_err();
    assert_eq!(crate::error::hint_of(&missing).as_deref(), Some(DIRECTORY_HINT));
}

#[test]
fn a_file_that_turns_into_a_fifo_does_not_block() {
    let top = tree(&[]);
    let fifo = top.path().join("fifo");
    rustix::fs::mkfifoat(CWD, &fifo, Mode::RWXU).unwrap();
    for project in [None, Some(Arc::from(top.path().canonicalize().unwrap()))] {
        let file = CountedFile { project, ..counted(fifo.clone(), None, Path::new("/")) };
        let error = file.open().unwrap_err().to_string();
        assert!(error.ends_with("is a FIFO: only regular files can be part of the checksum"), "{error}");
    }
}

#[test]
fn git_inside_is_warned_about() {
    let top = tree(&[("a", ""), (".git/HEAD", "ref"), ("sub/.git/HEAD", "ref")]);
    let mut warnings = config_checksum(&[top.path()]).unwrap().warnings;
    warnings.sort();
    let top = top.path().display();
    assert!(warnings[0].starts_with(&format!("{top}/.git is in the definition")), "{warnings:?}");
    assert!(warnings[1].starts_with(&format!("{top}/sub/.git is in the definition")), "{warnings:?}");
    assert_eq!(warnings.len(), 2);
}

#[test]
fn a_deep_tree_is_walked() {
    let top = tree(&[]);
    let mut directory = top.path().to_owned();
    (0..500).for_each(|_| directory.push("d"));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("f"), "hello\n").unwrap();
    assert_eq!(config_checksum(&[top.path()]).unwrap().hex, "d4bb773a0da54b50d60e6089e12ed7e53c7e423c");
}

#[test]
fn links_and_modes_are_seen_for_the_fingerprint() {
    use std::fs::Permissions;
    let top = tree(&[("d/run", ""), ("d/text", ""), ("d/sub/x", "")]);
    let mode = |path: &str, mode| {
        std::fs::set_permissions(top.path().join(path), Permissions::from_mode(mode)).unwrap();
    };
    mode("d/run", 0o700);
    mode("d/text", 0o655);
    symlink("run", top.path().join("d/link")).unwrap();
    symlink("sub", top.path().join("d/to-sub")).unwrap();
    let tree = DefinitionTree::read(&[top.path().join("d")]).unwrap();
    let seen: Vec<_> = tree.files.iter().map(|file| (file.executable, file.link.as_deref())).collect();
    assert_eq!(seen, [(true, Some(Path::new("run"))), (true, None), (false, None), (false, None)]);
    assert_eq!(tree.directory_links, [(top.path().join("d/to-sub"), "sub".into())]);
}

/// A project with a definition `web`, and a file and a directory outside the project.
fn project() -> (tempfile::TempDir, PathBuf) {
    let top = tree(&[
        ("outside/secret", "secret"),
        ("outside/dir/x", "secret"),
        ("project/web/dir/x", "x"),
        ("project/web/y", "y"),
        ("project/web/.git/config", "token"),
        ("project/.git/config", "token"),
    ]);
    let project = top.path().canonicalize().unwrap().join("project");
    (top, project)
}

fn counted(path: PathBuf, link: Option<&str>, project: &Path) -> CountedFile {
    let (link, project) = (link.map(PathBuf::from), Some(Arc::from(project)));
    CountedFile { path, sha1: String::new(), executable: false, link, project }
}

#[test]
fn only_what_was_opened_inside_the_project_is_read() {
    let (_top, project) = project();
    let web = project.join("web");
    let read = || config_checksum_within(&[&web], &|_| Some(project.clone()));
    let whole = read().unwrap();
    assert_eq!(whole.hex, config_checksum(&[&web]).unwrap().hex, "git's own files count, too");
    assert_eq!(whole.files.len(), 3);

    // These are the paths that a list of the directory contained. Then another process replaces what they lead to.
    let outside = project.parent().unwrap().join("outside");
    std::fs::remove_file(web.join("y")).unwrap();
    symlink(outside.join("secret"), web.join("y")).unwrap();
    std::fs::rename(web.join("dir"), project.join("moved")).unwrap();
    symlink(outside.join("dir"), web.join("dir")).unwrap();
    for path in ["y", "dir/x"] {
        let error = counted(web.join(path), None, &project).open().unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(error.to_string().contains("which is outside the project"), "{error:#}");
    }
    let error = list(&web.join("dir"), Some(&Arc::from(&*project))).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Definition);
    assert!(error.to_string().contains("which is outside the project"), "{error:#}");

    std::fs::remove_file(web.join("y")).unwrap();
    symlink("../.git/config", web.join("y")).unwrap();
    let error = counted(web.join("y"), Some("../.git/config"), &project).open().unwrap_err();
    assert!(error.to_string().contains("web/y: is a symbolic link that resolves to"), "{error:#}");
    assert!(error.to_string().contains("inside a .git"), "{error:#}");
    assert!(counted(web.join(".git/config"), None, &project).open().is_ok());
}

#[test]
fn a_stop_ends_the_reading_of_a_definition() {
    let top = tree(&[("w/a", "a"), ("w/b/c", "c")]);
    let hole = std::fs::File::create(top.path().join("w/hole")).unwrap();
    hole.set_len(1 << 40).unwrap();
    // The stop comes while the first directory is listed, and after a few buffers of the hole.
    for after in [1, 40] {
        let asked = AtomicUsize::new(0);
        let stop = || asked.fetch_add(1, Ordering::Relaxed) >= after;
        let error = TreeReader::new(&stop).read(&[top.path().join("w")], &|_| None).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Interrupted, "{error:#}");
        assert!(asked.into_inner() < after + 2 * MAX_THREADS);
    }
}

#[test]
fn too_many_files_are_an_error() {
    let top = tree(&[("w/a", "a"), ("w/.b", "b"), ("w/d/c", "c")]);
    let read = |change: &dyn Fn(&mut TreeReader<'_>)| {
        let mut reader = TreeReader::new(&|| false);
        change(&mut reader);
        reader.read(&[top.path().join("w")], &|_| None)
    };
    let paths: usize =
        ["w/a", "w/.b", "w/d", "w/d/c"].map(|path| top.path().join(path).as_os_str().len()).iter().sum();
    assert_eq!(read(&|reader| reader.objects_left = 4).unwrap().files.len(), 2);
    assert_eq!(read(&|reader| reader.path_bytes_left = paths).unwrap().files.len(), 2);
    for error in [
        read(&|reader| reader.objects_left = 3).unwrap_err(),
        read(&|reader| reader.path_bytes_left = paths - 1).unwrap_err(),
    ] {
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(error.to_string().contains("/w: the definition has too many files"), "{error:#}");
    }
}

#[test]
fn an_error_of_the_disk_is_not_the_definitions() {
    // Reading this file at its beginning fails with EIO.
    let error = sha1_of(File::open("/proc/self/mem").unwrap(), Path::new("x"), &|| Ok(())).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Machine);
}
