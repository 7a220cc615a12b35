//! The documentation: its runnable blocks run, its fences are spelt right, its links lead somewhere. Needs root and
//! `OVEN_TEST_BASE`; the packages that the examples install come from the mirror.
//!
//! A fence with the info string `sh run` is run. All of a file's blocks are one shell session, in a directory that
//! looks like a clone: `scripts`, a copy of `examples`, the built `oven` first in `PATH`, a local region of its own.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// In seconds, of one file. A bake of the examples takes about 20.
const TIME_LIMIT: u32 = 900;
const RUNNABLE: &str = "sh run";

/// A fenced block.
#[derive(Debug, PartialEq)]
struct Block {
    /// What stands after the opening fence.
    info: String,
    /// Of the opening fence; the first line of a file is 1.
    line: usize,
    body: Vec<String>,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and its neighbours, and all of docs/, by their paths in the repository.
fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    collect(repository(), false, &mut pages);
    collect(&repository().join("docs"), true, &mut pages);
    pages.sort();
    assert!(pages.contains(&PathBuf::from("README.md")), "{pages:?}");
    pages
}

fn collect(dir: &Path, deeper: bool, pages: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if deeper && path.is_dir() {
            collect(&path, true, pages);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path.strip_prefix(repository()).unwrap().to_owned());
        }
    }
}

fn read(page: &Path) -> String {
    fs::read_to_string(repository().join(page)).unwrap()
}

/// Blocks, and lines with their numbers.
type Page<'a> = (Vec<Block>, Vec<(usize, &'a str)>);

/// The fenced blocks of a page, and its other lines with their numbers. Fails for a fence that is not closed.
fn parse(text: &str) -> Result<Page<'_>, String> {
    let (mut blocks, mut prose) = (Vec::new(), Vec::new());
    let mut open: Option<(Block, String, usize)> = None;
    for (line, content) in (1..).zip(text.lines()) {
        let trimmed = content.trim_start();
        let indent = content.len() - trimmed.len();
        let ticks: String = trimmed.chars().take_while(|&c| c == '`').collect();
        match &mut open {
            Some((_, fence, _)) if trimmed.trim_end() == ticks && ticks.len() >= fence.len() => {
                blocks.extend(open.take().map(|(block, ..)| block));
            }
            Some((block, _, outer)) => block.body.push(content[indent.min(*outer)..].to_owned()),
            None if ticks.len() >= 3 => {
                let info = trimmed[ticks.len()..].trim().to_owned();
                open = Some((Block { info, line, body: Vec::new() }, ticks, indent));
            }
            None => prose.push((line, content)),
        }
    }
    match open {
        Some((block, ..)) => Err(format!("{}: the block that begins here has no end", block.line)),
        None => Ok((blocks, prose)),
    }
}

/// An info string is the name of a language, or marks a block as runnable: nothing that looks like it.
fn check_info(info: &str) -> Result<(), String> {
    let is_language = info.bytes().all(|b| b.is_ascii_lowercase()) && !info.contains("run");
    if is_language || info == RUNNABLE {
        return Ok(());
    }
    Err(format!("the info string {info:?} is neither a language nor {RUNNABLE:?}"))
}

/// The runnable blocks as one script, in which each line has the number that it has in the page.
fn script(blocks: &[Block]) -> String {
    // No block's body begins before line 2.
    let mut lines = vec![r#"trap 'echo "line $LINENO failed: $BASH_COMMAND" >&2' ERR"#.to_owned()];
    for block in blocks {
        lines.resize(block.line, String::new());
        lines.extend(block.body.iter().cloned());
    }
    lines.join("\n") + "\n"
}

/// Runs one page's blocks. Fails with what they wrote.
fn run(page: &Path, blocks: &[Block]) -> Result<(), String> {
    let base = std::env::var_os("OVEN_TEST_BASE").expect("OVEN_TEST_BASE is not set: run scripts/test root");
    let dir = tempfile::Builder::new().prefix("oven-docs.").tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let clone = path("clone");
    fs::create_dir(&clone).unwrap();
    std::os::unix::fs::symlink(repository().join("scripts"), clone.join("scripts")).unwrap();
    let copy = Command::new("cp").arg("-r").arg(repository().join("examples")).arg(&clone).status().unwrap();
    assert!(copy.success());
    // What was baked in the working tree is of another region.
    for example in ["base", "web"] {
        _ = fs::remove_file(clone.join("examples").join(example).join(".ami_id.json"));
    }
    fs::write(path("script"), script(blocks)).unwrap();

    let programs = Path::new(env!("CARGO_BIN_EXE_oven")).parent().unwrap();
    let mut search = vec![programs.to_owned()];
    search.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let output = fs::File::create(path("output")).unwrap();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=30", &TIME_LIMIT.to_string(), "bash", "-Eeuo", "pipefail"]);
    command.arg(path("script")).current_dir(&clone).stdin(Stdio::null());
    command.stdout(output.try_clone().unwrap()).stderr(output);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("OVEN_")) {
        command.env_remove(name);
    }
    command.env("PATH", std::env::join_paths(search).unwrap());
    command.env("OVEN_REGION_DIR", path("region"));
    // Where scripts/make-base finds the image that it made for the tests.
    command.env("OVEN_CACHE", Path::new(&base).parent().unwrap());
    command.env("OVEN_TEST_BASE", &base);
    let status = command.status().unwrap();
    if status.success() {
        return Ok(());
    }
    let why = match status.code() {
        Some(124) => format!("took longer than {TIME_LIMIT} s"),
        _ => status.to_string(),
    };
    let output = String::from_utf8_lossy(&fs::read(path("output")).unwrap()).into_owned();
    let script = path("script").display().to_string();
    let output = output.replace(&script, &page.display().to_string());
    let failed = output.lines().rev().find_map(|line| line.strip_prefix("line ")?.split(' ').next());
    let line = failed.map_or_else(|| blocks[0].line.to_string(), str::to_owned);
    Err(format!("{}:{line}: {why}\n{output}", page.display()))
}

/// Relative link targets of a line: of `[text](target)`, `src="target"` and `[label]: target`.
fn targets(line: &str) -> Vec<String> {
    // Code is no link.
    let prose: String = line.split('`').step_by(2).collect();
    let mut found = Vec::new();
    for (before, end) in [("](", &[')', ' '][..]), ("src=\"", &['"']), ("srcset=\"", &['"'])] {
        for rest in prose.split(before).skip(1) {
            found.push(rest.split(end).next().unwrap().to_owned());
        }
    }
    if let Some((_, target)) = prose.strip_prefix('[').and_then(|rest| rest.split_once("]: ")) {
        found.push(target.trim().to_owned());
    }
    found.retain(|target| !target.contains("://") && !target.starts_with("mailto:"));
    found
}

/// The anchors that GitHub gives the headings of a page.
fn anchors(text: &str) -> Result<HashSet<String>, String> {
    let mut anchors = HashSet::new();
    for (_, line) in parse(text)?.1 {
        let heading = line.trim_start_matches('#');
        if heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let again = (1..).map(|n| format!("{anchor}-{n}"));
        let free = std::iter::once(anchor.clone()).chain(again).find(|name| !anchors.contains(name));
        anchors.extend(free);
    }
    Ok(anchors)
}

fn check_link(page: &Path, target: &str) -> Result<(), String> {
    let (file, anchor) = target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)));
    let at = repository().join(page);
    let path = if file.is_empty() { at } else { at.parent().unwrap().join(file) };
    if !path.exists() {
        return Err(format!("{target} does not exist"));
    }
    let Some(anchor) = anchor.filter(|_| path.extension().is_some_and(|extension| extension == "md")) else {
        return Ok(());
    };
    match anchors(&fs::read_to_string(&path).unwrap())?.contains(anchor) {
        true => Ok(()),
        false => Err(format!("{target}: the page has no such heading")),
    }
}

#[test]
fn every_runnable_block_of_the_documentation_runs() {
    let mut found = 0;
    let mut runnable = Vec::new();
    for page in pages() {
        let mut blocks = parse(&read(&page)).unwrap_or_else(|error| panic!("{}:{error}", page.display())).0;
        blocks.retain(|block| block.info == RUNNABLE);
        found += blocks.len();
        if !blocks.is_empty() {
            runnable.push((page, blocks));
        }
    }
    // Much of a bake is waiting for the mirror: as many pages at a time as there are cores.
    let next = AtomicUsize::new(0);
    let work = || {
        let next = || runnable.get(next.fetch_add(1, Relaxed));
        std::iter::from_fn(next).filter_map(|(page, blocks)| run(page, blocks).err()).collect::<Vec<_>>()
    };
    let failures: Vec<String> = std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    assert!(found > 0, "no page has a block that is marked {RUNNABLE:?}");
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn info_strings_are_a_language_or_mark_a_runnable_block() {
    let mut faults = Vec::new();
    for page in pages() {
        let blocks = parse(&read(&page)).unwrap_or_else(|error| panic!("{}:{error}", page.display())).0;
        for block in blocks {
            let fault = check_info(&block.info).err();
            faults.extend(fault.map(|fault| format!("{}:{}: {fault}", page.display(), block.line)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    for good in ["", "sh", "toml", "sh run"] {
        assert_eq!(check_info(good), Ok(()));
    }
    for bad in ["sh Run", "sh runs", "sh,run", "sh  run", "bash run", "shrun", "sh {run}", "run", "sh rnu"] {
        assert!(check_info(bad).is_err(), "{bad}");
    }
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    let (mut links, mut faults) = (0, Vec::new());
    for page in pages() {
        let text = read(&page);
        for (line, content) in parse(&text).unwrap_or_else(|error| panic!("{}:{error}", page.display())).1 {
            for target in targets(content) {
                links += 1;
                let fault = check_link(&page, &target).err();
                faults.extend(fault.map(|fault| format!("{}:{line}: {fault}", page.display())));
            }
        }
    }
    assert!(links > 0);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn blocks_keep_their_line_numbers_in_the_script() {
    let text =
        "# A\n\n```sh run\none\n```\n- b\n  ```sh run\n  two <<END\n    three\n  ```\n````text\n```\n````\n";
    let (blocks, prose) = parse(text).unwrap();
    assert_eq!(blocks.len(), 3);
    assert_eq!(prose, [(1, "# A"), (2, ""), (6, "- b")]);
    let runnable: Vec<Block> = blocks.into_iter().filter(|block| block.info == RUNNABLE).collect();
    let script = script(&runnable);
    let lines: Vec<&str> = script.lines().collect();
    assert_eq!((lines[3], lines[7], lines[8], lines.len()), ("one", "two <<END", "  three", 9));
    assert!(parse("```sh\nnever closed\n").is_err());
    assert_eq!(targets("see [a](b.md#c), `[x](y)`, [d](https://e)"), ["b.md#c"]);
}
