//! The README's commands, run, lead to the output printed there. `…` stands for any lines.

use std::path::Path;
use std::process::Command;

use crate::support::{Launch, METERR, read};

/// A command of a console block and what it prints.
struct Shown {
    command: String,
    output: Vec<String>,
}

/// The commands in the console blocks of a section.
fn commands(section: &str) -> Vec<Shown> {
    let readme = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let text = readme.split("\n## ").find(|text| text.starts_with(section)).unwrap();
    let mut found: Vec<Shown> = Vec::new();
    for block in text.split("```console\n").skip(1) {
        let mut open = false;
        for line in block.split("```").next().unwrap().lines() {
            match line.strip_prefix("$ ") {
                Some(command) => {
                    found.push(Shown { command: command.to_owned(), output: Vec::new() });
                }
                None if open => {
                    let command = &mut found.last_mut().unwrap().command;
                    command.push('\n');
                    command.push_str(line);
                }
                None => found.last_mut().unwrap().output.push(line.trim_end().to_owned()),
            }
            let command = &found.last().unwrap().command;
            open = command.matches('\'').count() % 2 == 1 || command.ends_with('\\');
        }
    }
    found
}

/// Whether the lines are the pattern's, `…` being any number of them.
fn like(lines: &[&str], pattern: &[String]) -> bool {
    match pattern.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first == "…" => (0..=lines.len()).any(|n| like(&lines[n..], rest)),
        Some((first, rest)) => lines.first() == Some(&first.as_str()) && like(&lines[1..], rest),
    }
}

fn check(shown: &Shown, found: &str) {
    let lines: Vec<&str> = found.lines().map(str::trim_end).collect();
    let (command, output) = (&shown.command, &shown.output);
    assert!(like(&lines, output), "$ {command}\nprints\n{found}\nnot\n{}", output.join("\n"));
}

#[test]
fn the_first_output_is_the_one_shown() {
    let commands = commands("Run it");
    let demo = commands.iter().find(|c| c.command.ends_with("demo --once")).unwrap();
    let output = crate::support::run(&["demo", "--once"]);
    check(demo, &String::from_utf8(output.stdout).unwrap());
}

#[test]
fn the_walk_through_leads_where_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let server = Launch::on(dir.path()).start();
    let mut ran = 0;
    for shown in commands("See it take something back") {
        if shown.command.ends_with("meterr serve") {
            continue;
        }
        ran += 1;
        if shown.command.starts_with("curl ") {
            // Without curl, which a machine need not have; as it sends such data.
            let body = shown.command.split('\'').nth(1).unwrap();
            let media_type = "application/x-www-form-urlencoded";
            let answer = server.send("POST", "/v1/events", media_type, body.as_bytes());
            check(&shown, &answer.text);
            continue;
        }
        let command = shown.command.replace("target/release/meterr", METERR);
        let output = Command::new("bash")
            .args(["-c", &format!("{command} 2>&1")])
            .env("METERR_URL", &server.url)
            .output()
            .unwrap();
        check(&shown, &String::from_utf8(output.stdout).unwrap());
    }
    assert!(ran >= 6, "only {ran} commands were found");
}
