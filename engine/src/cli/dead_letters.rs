//! `meterr dead-letters`: events that were not counted, why, and how to count them after all.

use meterr_connectors::api::DeadLetter;

use super::args::{
    DeadLettersCommand, DeadLettersListArgs, DeadLettersReplayArgs, DeadLettersShowArgs,
};
use super::client::{Client, Method, Query, path};
use super::table::{Table, harmless};
use super::{Console, Exit};

/// Largest mended line.
const LINE_LEN_MAX: u64 = 1_000_000;

/// `meterr dead-letters …`
pub(super) fn dead_letters(
    command: &DeadLettersCommand,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    match command {
        DeadLettersCommand::List(args) => list(args, console),
        DeadLettersCommand::Show(args) => show(args, console),
        DeadLettersCommand::Replay(args) => replay(args, console),
    }
}

fn list(args: &DeadLettersListArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let mut question: Query = vec![("limit", args.limit.to_string())];
    question.extend(args.reason.map(|reason| ("reason", reason.name().to_owned())));
    question.extend(args.shard.map(|shard| ("shard", shard.to_string())));
    question.extend(args.before.clone().map(|before| ("before", before)));
    let answer = client.get("/v1/dead-letters", &question)?;
    if args.client.json {
        console.json(&answer)?;
        return Ok(Exit::Done);
    }
    let letters: Vec<DeadLetter> = client.list(&answer, "rows")?;
    if letters.is_empty() {
        writeln!(console.out, "no dead letters")?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["id", "reason", "subject", ">position", ">line", "detail"]);
    for letter in letters {
        let replayed = letter.replayed.map_or(String::new(), |at| format!("[replayed {at}] "));
        table.row([
            letter.id,
            letter.reason.name().to_owned(),
            letter.subject,
            letter.position.to_string(),
            letter.line.to_string(),
            format!("{replayed}{}", letter.detail),
        ]);
    }
    table.print(&mut console.out)?;
    if let Some(before) = answer.get("next_before").and_then(|id| id.as_str()) {
        writeln!(console.err, "there are older ones: --before {}", harmless(before))?;
    }
    Ok(Exit::Done)
}

fn show(args: &DeadLettersShowArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let answer = client.get(&path(&["v1", "dead-letters", &args.id]), &Query::new())?;
    if args.client.json {
        console.json(&answer)?;
        return Ok(Exit::Done);
    }
    let letter: DeadLetter = client.read(&answer)?;
    let out = &mut console.out;
    writeln!(out, "id        {}", harmless(&letter.id))?;
    writeln!(out, "reason    {}", letter.reason.name())?;
    writeln!(out, "detail    {}", harmless(&letter.detail))?;
    writeln!(out, "subject   {}", harmless(&letter.subject))?;
    writeln!(out, "position  {}, line {}", letter.position, letter.line)?;
    if let Some(at) = letter.replayed {
        writeln!(out, "replayed  {at}")?;
    }
    let cut = if letter.truncated { " (cut off)" } else { "" };
    if let Some(raw) = &letter.raw {
        writeln!(out, "bytes{cut}:\n{}", harmless(raw))?;
    } else if let Some(raw) = &letter.raw_base64 {
        writeln!(out, "bytes in base64{cut}:\n{}", harmless(raw))?;
    }
    Ok(Exit::Done)
}

fn replay(args: &DeadLettersReplayArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let mended = match &args.mended {
        Some(file) => {
            let mended = console.read(file, LINE_LEN_MAX)?;
            // An empty body would mean the letter as it is.
            anyhow::ensure!(!mended.trim_ascii().is_empty(), "{} is empty", file.display());
            mended
        }
        None => Vec::new(),
    };
    let path = path(&["v1", "dead-letters", &args.id, "replay"]);
    let answer = client.send(Method::Post, &path, &Query::new(), "application/json", &mended)?;
    super::control::changed(&answer, args.client.json, "published again", console)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Server, reply, run, run_with_input};
    use super::*;

    #[test]
    fn letters_are_listed_and_shown_without_driving_the_terminal() {
        let letter = json!({"id": "3-88-1", "subject": "usage.3.@batch", "position": 7, "line": 2,
            "reason": "missing_field", "detail": "\"org\" is required"});
        let mut whole = letter.clone();
        whole["raw"] = "{\u{1b}[2J}".into();
        let server = Server::new(vec![
            reply(200, &json!({"rows": [letter], "next_before": "3-88-1"}).to_string()),
            reply(200, &whole.to_string()),
            reply(200, &json!({"rows": [], "next_before": null}).to_string()),
        ]);
        let url = server.url();
        let ran = run(&["dead-letters", "list", "--reason", "missing_field", "--url", &url]);
        assert_eq!(
            ran.out,
            "ID      REASON         SUBJECT         POSITION  LINE  DETAIL\n\
             3-88-1  missing_field  usage.3.@batch         7     2  \"org\" is required\n"
        );
        assert_eq!(ran.err, "there are older ones: --before 3-88-1\n");
        let ran = run(&["dead-letters", "show", "3-88-1", "--url", &url]);
        assert!(ran.out.ends_with("bytes:\n{\\u{1b}[2J}\n"), "{}", ran.out);
        assert_eq!(run(&["dead-letters", "list", "--url", &url]).out, "no dead letters\n");
        let targets: Vec<String> = server.requests().into_iter().map(|r| r.target).collect();
        assert_eq!(
            targets,
            [
                "/v1/dead-letters?limit=50&reason=missing_field",
                "/v1/dead-letters/3-88-1",
                "/v1/dead-letters?limit=50",
            ]
        );
    }

    #[test]
    fn a_letter_is_replayed_as_it_is_or_mended() {
        let server = Server::answering(|_| reply(202, r#"{"position":"3:9"}"#));
        let url = server.url();
        let ran = run(&["dead-letters", "replay", "3-88-1", "--url", &url]);
        assert_eq!(ran.out, "published again at position 3:9\n");
        let replay = ["dead-letters", "replay", "3-88-1", "--mended", "-", "--json", "--url", &url];
        let ran = run_with_input(&replay, "{\"id\":\"x\"}\n");
        assert_eq!(ran.out, "{\"position\":\"3:9\"}\n");
        let ran = run_with_input(&replay, " \n");
        assert_eq!((ran.exit, ran.err.as_str()), (Exit::Failed, "error: - is empty\n"));
        let bodies: Vec<String> = server.requests().into_iter().map(|r| r.body).collect();
        assert_eq!(bodies, ["", "{\"id\":\"x\"}\n"]);
    }
}
