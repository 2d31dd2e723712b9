//! The house itself: who depends on whom, how long files are, where names are made, and that ARCHITECTURE.md tells all of it.
//!
//! Each test reads the source as text. A failure names the file and the way out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::sources::{files, root, text};

/// The most lines of code of a file, without its unit tests.
const MAX_LINES: usize = 400;

/// Names that several types have, for a reason. Nothing may be added here: give the new type a name of its own.
const SHARED_NAMES: &[&str] = &[
    // TLS, and what stands in its place in builds without it.
    "Connector",
    "Encryption",
    // What the clones of a handle share: the handle's name stands beside it.
    "Inner",
    // Signals of Unix, and of Windows.
    "SignalSource",
];

/// A file of `src`, as text.
struct Source {
    /// Its path, from `src/` on, with slashes.
    path: String,
    /// Its lines without comments, and without what is compiled only for tests.
    code: Vec<String>,
    /// How many lines it has without unit tests.
    lines: usize,
}

impl Source {
    /// The module under the crate's root that it belongs to.
    fn module(&self) -> &str {
        let path = self.path.trim_start_matches("src/");
        path.split_once('/').map_or_else(|| path.trim_end_matches(".rs"), |(module, _)| module)
    }

    fn read(root: &Path, file: &Path) -> Self {
        let text = fs::read_to_string(file).expect("it can be read");
        let relative = file.strip_prefix(root).expect("it is under the root");
        let path = relative.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
        let lines = without_tests(&text);
        let is_code = |line: &&String| !line.trim_start().starts_with("//");
        let code = lines.iter().filter(is_code).cloned().collect();
        Self { path, code, lines: lines.len() }
    }
}

/// The lines of a file without the items that `#[cfg(test)]` stands before.
fn without_tests(text: &str) -> Vec<String> {
    let (mut lines, mut kept) = (text.lines(), Vec::new());
    while let Some(line) = lines.next() {
        if line != "#[cfg(test)]" {
            kept.push(line.to_owned());
            continue;
        }
        let item = lines.next().unwrap_or_default();
        if item.ends_with('{') {
            // The end of an item that begins at the margin stands at the margin.
            lines.by_ref().find(|line| *line == "}");
        }
    }
    kept
}

/// The files of `src`, without those that hold nothing but unit tests.
fn sources() -> Vec<Source> {
    let root = root();
    let tests: BTreeSet<_> = files(&root.join("src"), ".rs").iter().flat_map(|file| test_files(file)).collect();
    let all = files(&root.join("src"), ".rs").into_iter().filter(|file| !tests.contains(file));
    all.map(|file| Source::read(root, &file)).collect()
}

/// The files that `#[cfg(test)] mod name;` in this one names.
fn test_files(file: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(file).expect("it can be read");
    let lines: Vec<_> = text.lines().collect();
    let declared = lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]");
    let names = declared.filter_map(|pair| pair[1].strip_prefix("mod ")?.strip_suffix(';'));
    names.map(|name| file.with_extension("").join(format!("{name}.rs"))).collect()
}

fn architecture() -> String {
    text("ARCHITECTURE.md")
}

/// The arrows that ARCHITECTURE.md allows: each module in the order of the list, and those that it may use.
fn allowed() -> Vec<(String, BTreeSet<String>)> {
    let text = architecture();
    let (_, block) = text.split_once("```arrows\n").expect("ARCHITECTURE.md has a block of arrows");
    let (block, _) = block.split_once("```").expect("the block ends");
    let arrows = block.lines().map(|line| {
        let (module, used) = line.split_once("->").expect("each line is `module -> those that it may use`");
        (module.trim().to_owned(), used.split_whitespace().map(str::to_owned).collect())
    });
    arrows.collect()
}

/// The modules that a line of code names by `crate::module`.
fn used(line: &str) -> impl Iterator<Item = &str> {
    line.split("crate::").skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = &rest[..end];
        name.starts_with(|c: char| c.is_ascii_lowercase()).then_some(name)
    })
}

fn fail_if(wrong: &[String], way_out: &str) {
    let mut said = String::new();
    for one in wrong {
        writeln!(said, "  {one}").expect("there is memory");
    }
    assert!(wrong.is_empty(), "{way_out}:\n{said}");
}

#[test]
fn modules_use_only_those_that_architecture_md_lets_them_use() {
    let allowed = allowed();
    let known: BTreeMap<_, _> = allowed.iter().map(|(module, used)| (module.as_str(), used)).collect();
    let (mut wrong, mut needed) = (BTreeSet::new(), BTreeSet::new());
    for source in sources() {
        let module = source.module();
        if matches!(module, "lib" | "guide") {
            continue;
        }
        for target in source.code.iter().flat_map(|line| used(line)).filter(|target| *target != module) {
            // Macros and items of the crate's root are not modules.
            if !known.contains_key(target) {
                continue;
            }
            needed.insert((module.to_owned(), target.to_owned()));
            if !known.get(module).is_some_and(|allowed| allowed.contains(target)) {
                wrong.insert(format!("{}: `{module}` uses `{target}`", source.path));
            }
        }
    }
    let wrong: Vec<_> = wrong.into_iter().collect();
    fail_if(
        &wrong,
        "move what is used below both, or add the arrow to the block in ARCHITECTURE.md, in a commit of its own",
    );
    let listed = allowed.iter().flat_map(|(module, used)| used.iter().map(|used| (module.clone(), used.clone())));
    let idle: Vec<_> = listed.filter(|arrow| !needed.contains(arrow)).map(|(a, b)| format!("{a} -> {b}")).collect();
    fail_if(&idle, "no file needs these arrows any more: take them out of ARCHITECTURE.md");
}

#[test]
fn arrows_point_down() {
    let allowed = allowed();
    let place = |name: &str| allowed.iter().position(|(module, _)| module == name);
    let mut wrong = Vec::new();
    for (at, (module, used)) in allowed.iter().enumerate() {
        for target in used {
            match place(target) {
                None => wrong.push(format!("{module} -> {target}: there is no line for `{target}`")),
                Some(below) if below <= at => wrong.push(format!("{module} -> {target}: `{target}` stands above")),
                Some(_) => {}
            }
        }
    }
    fail_if(&wrong, "in the block of arrows in ARCHITECTURE.md each module uses only those below it");
}

#[test]
fn every_module_has_a_line_among_the_arrows() {
    let known: BTreeSet<_> = allowed().into_iter().map(|(module, _)| module).collect();
    let modules: BTreeSet<_> = sources().iter().map(|source| source.module().to_owned()).collect();
    let is_missing = |module: &&String| !known.contains(*module) && !matches!(module.as_str(), "lib" | "guide");
    let missing: Vec<_> = modules.iter().filter(is_missing).cloned().collect();
    fail_if(&missing, "give each module a line in the block of arrows in ARCHITECTURE.md");
    let gone: Vec<_> = known.difference(&modules).cloned().collect();
    fail_if(
        &gone,
        "there are no such modules any more: take their lines out of the block of arrows in ARCHITECTURE.md",
    );
}

#[test]
fn only_the_transport_on_rabbitmq_names_lapin() {
    let is_rabbit = |path: &str| path == "src/transport/rabbit.rs" || path.starts_with("src/transport/rabbit/");
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !is_rabbit(&source.path)) {
        let named = source.code.iter().filter(|line| line.contains("lapin::") || line.contains("deadpool_lapin"));
        wrong.extend(named.map(|line| format!("{}: {}", source.path, line.trim())));
    }
    fail_if(&wrong, "lapin is known under src/transport/rabbit alone: go through `Transport`");
}

#[test]
fn names_on_the_broker_are_made_in_topology() {
    let is_topology = |path: &str| path == "src/topology.rs" || path.starts_with("src/topology/");
    // What they end in, and what headers begin with.
    let parts = [
        "x-hopline-",
        "}.rpc\"",
        "}.oneway\"",
        "}.events\"",
        "}.discovery\"",
        ".calls\"",
        ".work\"",
        ".retry\"",
        ".dead\"",
    ];
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !is_topology(&source.path)) {
        let made = source.code.iter().filter(|line| parts.iter().any(|part| line.contains(part)));
        wrong.extend(made.map(|line| format!("{}: {}", source.path, line.trim())));
    }
    fail_if(&wrong, "names of queues, exchanges, keys and headers are made in src/topology.rs: ask it for this one");
}

#[test]
fn no_file_is_long() {
    let long = sources().into_iter().filter(|source| source.lines > MAX_LINES);
    let long: Vec<_> =
        long.map(|source| format!("{}: {} lines without its tests", source.path, source.lines)).collect();
    fail_if(
        &long,
        &format!(
            "{MAX_LINES} lines are allowed. Split the file where it is about two things: `foo.rs` and `foo/part.rs`"
        ),
    );
}

#[test]
fn architecture_md_says_what_each_file_is_for() {
    let text = architecture();
    let (_, table) = text.split_once("## Where what is").expect("it has this part");
    let (table, _) = table.split_once("\n## ").expect("another part follows");
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.path != "src/lib.rs") {
        let path = source.path.trim_start_matches("src/");
        // A file is named from any of its directories on.
        let mut names = std::iter::successors(Some(path), |name| name.split_once('/').map(|(_, rest)| rest));
        if !names.any(|name| table.contains(&format!("`{name}`")) || table.contains(&format!("/{name}`"))) {
            wrong.push(source.path.clone());
        }
    }
    fail_if(&wrong, "say in ARCHITECTURE.md, under \"Where what is\", what these files are for");
}

#[test]
fn no_two_types_have_one_name() {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for line in &source.code {
            let item = line.trim_start_matches("pub ").trim_start();
            let item = item.strip_prefix("pub(").and_then(|rest| rest.split_once(") ")).map_or(item, |(_, rest)| rest);
            let Some(name) = ["struct ", "enum ", "trait "].iter().find_map(|kind| item.strip_prefix(kind)) else {
                continue;
            };
            let end = name.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(name.len());
            types.entry(name[..end].to_owned()).or_default().push(source.path.clone());
        }
    }
    types.retain(|_, places| places.len() > 1);
    let is_shared = |name: &str| SHARED_NAMES.contains(&name);
    let wrong = types.iter().filter(|(name, _)| !is_shared(name));
    let wrong: Vec<_> = wrong.map(|(name, places)| format!("{name}: {}", places.join(", "))).collect();
    fail_if(&wrong, "one name, one thing: give each of these types a name that tells it from the others");
    let told_apart = SHARED_NAMES.iter().filter(|name| !types.contains_key(**name)).map(|name| (*name).to_owned());
    fail_if(
        &told_apart.collect::<Vec<_>>(),
        "these names have one type now: take them off the list in tests/it/tidy.rs",
    );
}

#[test]
fn oneway_calls_are_written_a_oneway_call() {
    let (root, mut wrong) = (root(), Vec::new());
    // Put together here, so that this file does not have it either.
    let riddle = ["an", "oneway"].join(" ");
    let places = [
        "src",
        "cli",
        "macros",
        "docs",
        "examples",
        "tests",
        "benches",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
    ];
    for place in places.map(|place| root.join(place)) {
        let found = if place.is_dir() {
            [".rs", ".md"].iter().flat_map(|end| files(&place, end)).collect()
        } else {
            vec![place]
        };
        for file in found {
            let text = fs::read_to_string(&file).expect("it can be read").to_lowercase();
            let text = text.replace('`', "");
            let lines = text.lines().enumerate().filter(|(_, line)| {
                line.match_indices(&riddle).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric()))
            });
            wrong.extend(lines.map(|(number, _)| format!("{}:{}", file.display(), number + 1)));
        }
    }
    fail_if(&wrong, "write `a oneway call`");
}

/// One step of the way of a call, as a row of the table in ARCHITECTURE.md tells it.
struct Step {
    file: String,
    functions: Vec<String>,
}

/// The steps of the way of a call: the rows `| number | file | functions | what happens |`.
fn steps() -> Vec<Step> {
    let text = architecture();
    let (_, walk) = text.split_once("## The way of a call").expect("ARCHITECTURE.md has this part");
    let (walk, _) = walk.split_once("\n## ").expect("another part follows");
    let code = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut steps = Vec::new();
    for row in walk.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.split(" | ").collect();
        let number = cells[0].trim_start_matches("| ");
        if number.parse() != Ok(steps.len() + 1) {
            assert!(matches!(number, "step" | "---"), "step {} is next, and not: {row}", steps.len() + 1);
            continue;
        }
        let [_, file, functions, _] = &cells[..] else { panic!("a step has four cells: {row}") };
        let (file, functions) = (code(file).concat(), code(functions));
        assert!(!functions.is_empty(), "a step names the functions: {row}");
        steps.push(Step { file, functions });
    }
    assert!(steps.len() > 1, "ARCHITECTURE.md tells the way of a call as a table of steps");
    steps
}

/// The functions that a file defines, in order: `name`, and `Type::name` for each type or trait that the head of their
/// `impl` or `trait` names.
fn functions(text: &str) -> Vec<BTreeSet<String>> {
    let (mut found, mut head, mut in_head) = (Vec::new(), String::new(), false);
    for line in text.lines() {
        if !line.starts_with([' ', '/', '#']) && !line.is_empty() {
            in_head = line.starts_with("impl") || line.split(' ').any(|word| word == "trait");
            head.clear();
        }
        if in_head {
            head.push_str(line);
            in_head = !line.contains('{');
        }
        let is_code = !line.trim_start().starts_with("//");
        let Some((_, rest)) = line.split_once("fn ").filter(|_| is_code) else { continue };
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        let types = head.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        found.push(types.map(|of| format!("{of}::{name}")).chain([name.to_owned()]).collect());
    }
    found
}

#[test]
fn the_way_of_a_call_names_files_once_and_functions_that_are_in_them() {
    let (mut wrong, mut opened) = (Vec::new(), BTreeSet::new());
    for (number, Step { file, functions: named }) in (1..).zip(steps()) {
        if !opened.insert(file.clone()) {
            wrong.push(format!("step {number}: `{file}` is opened a second time"));
        }
        let Ok(text) = fs::read_to_string(root().join(&file)) else {
            wrong.push(format!("step {number}: there is no file `{file}`"));
            continue;
        };
        let defined = functions(&without_tests(&text).join("\n"));
        let gone = named.iter().filter(|name| !defined.iter().any(|names| names.contains(*name)));
        wrong.extend(gone.map(|name| format!("step {number}: `{file}` has no function `{name}`")));
    }
    fail_if(&wrong, "tell the way of a call as it is now, under \"The way of a call\" in ARCHITECTURE.md");
}
