//! Cursors: the pages of one answer show one moment.
//!
//! The first page pins the whole answer; every later page is cut from it, so all of them carry the
//! same `as_of` and no row is shown twice or missed because spend changed in between. A page may be
//! asked for again (a lost response costs nothing). Memory is bounded in rows: the oldest answers go
//! first, and a cursor whose answer is gone is refused with "begin again" rather than served from
//! newer figures. Nothing is kept across a restart.
//!
//! A cursor is `<128 random bits>.<row>`, and `.<node>` where several nodes share a surface. The bits come from SipHash keyed by the operating system's
//! randomness, and the path asked by must be the pinned one: a guessed or forged cursor shows nothing
//! that its sender could not ask for directly.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::problem::{Kind, Problem};
use crate::api::{SpendAnswer, SpendQuery};

/// What an answer was given to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    /// The declared view asked, if it was one.
    pub view: Option<String>,
    /// The query. Its `min_position` plays no part: it does not change what is asked.
    pub query: SpendQuery,
}

impl Question {
    /// Whether both are about the same rows of the same org, user and view.
    fn same_path(&self, other: &Question) -> bool {
        let path = |q: &Question| (q.view.clone(), q.query.org.clone(), q.query.user.clone());
        path(self) == path(other)
    }

    /// Whether both ask the same.
    fn same(&self, other: &Question) -> bool {
        let plain = |q: &Question| SpendQuery { min_position: None, ..q.query.clone() };
        self.view == other.view && plain(self) == plain(other)
    }
}

struct Pinned {
    id: u128,
    question: Question,
    answer: Arc<SpendAnswer>,
    expires: Instant,
}

struct Kept {
    /// Oldest first; all live equally long, so this is the order of expiry too.
    pinned: VecDeque<Pinned>,
    rows: usize,
    count: u64,
}

/// The pinned answers.
pub(crate) struct Cursors {
    kept: Mutex<Kept>,
    random: RandomState,
    lifetime: Duration,
    rows_max: usize,
    /// Ends each cursor.
    suffix: String,
}

/// A page: which rows of the answer, and the cursor of the next one.
#[derive(Debug)]
pub(crate) struct Page {
    pub answer: Arc<SpendAnswer>,
    pub rows: std::ops::Range<usize>,
    pub next_cursor: Option<String>,
}

impl Cursors {
    /// Keeps answers for `lifetime`, at most `rows_max` rows of them. `node` names this node in the
    /// cursors, unless it is empty.
    pub fn new(lifetime: Duration, rows_max: usize, node: &str) -> Cursors {
        Cursors {
            kept: Mutex::new(Kept { pinned: VecDeque::new(), rows: 0, count: 0 }),
            random: RandomState::new(),
            lifetime,
            rows_max,
            suffix: if node.is_empty() { String::new() } else { format!(".{node}") },
        }
    }

    /// The first page of an answer; pins it when there are more.
    pub fn first(
        &self,
        question: Question,
        answer: SpendAnswer,
        limit: usize,
        now: Instant,
    ) -> Result<Page, Problem> {
        let rows = answer.rows.len();
        let answer = Arc::new(answer);
        if rows <= limit {
            return Ok(Page { answer, rows: 0..rows, next_cursor: None });
        }
        if rows > self.rows_max {
            return Err(Problem::new(
                Kind::AnswerTooLarge,
                format!(
                    "the answer has {rows} rows; at most {} can be kept for paging",
                    self.rows_max
                ),
            )
            .member("rows", rows)
            .member("limit", self.rows_max));
        }
        let mut kept = self.kept.lock();
        while let Some(oldest) = kept.pinned.front()
            && (oldest.expires <= now || kept.rows + rows > self.rows_max)
        {
            kept.drop_oldest();
        }
        kept.count += 1;
        let id = u128::from(self.random.hash_one((kept.count, false))) << 64
            | u128::from(self.random.hash_one((kept.count, true)));
        kept.rows += rows;
        kept.pinned.push_back(Pinned {
            id,
            question,
            answer: answer.clone(),
            expires: now + self.lifetime,
        });
        Ok(Page { answer, rows: 0..limit, next_cursor: Some(self.token(id, limit)) })
    }

    /// A later page. With `given`, the parameters beside the cursor must ask what was pinned.
    pub fn next(
        &self,
        cursor: &str,
        question: &Question,
        given: bool,
        limit: usize,
        now: Instant,
    ) -> Result<Page, Problem> {
        let wrong = || Problem::parameter("cursor", cursor, "the next_cursor of an earlier page");
        let (id, from) = cursor.strip_suffix(&self.suffix).and_then(parsed).ok_or_else(wrong)?;
        let mut kept = self.kept.lock();
        while kept.pinned.front().is_some_and(|oldest| oldest.expires <= now) {
            kept.drop_oldest();
        }
        let Some(pinned) = kept.pinned.iter().find(|pinned| pinned.id == id) else {
            return Err(Problem::new(
                Kind::CursorExpired,
                format!(
                    "the answer of this cursor is no longer kept ({} s at most); begin again \
                     without cursor",
                    self.lifetime.as_secs()
                ),
            ));
        };
        let rows = pinned.answer.rows.len();
        if !pinned.question.same_path(question) || from >= rows {
            return Err(wrong());
        }
        if given && !pinned.question.same(question) {
            return Err(Problem::parameter(
                "cursor",
                cursor,
                "given alone or with the parameters of its first page",
            ));
        }
        let to = from.saturating_add(limit).min(rows);
        Ok(Page {
            answer: pinned.answer.clone(),
            rows: from..to,
            next_cursor: (to < rows).then(|| self.token(id, to)),
        })
    }

    fn token(&self, id: u128, row: usize) -> String {
        format!("{id:032x}.{row}{}", self.suffix)
    }
}

impl Kept {
    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.pinned.pop_front() {
            self.rows -= oldest.answer.rows.len();
        }
    }
}

fn parsed(cursor: &str) -> Option<(u128, usize)> {
    let (id, row) = cursor.split_once('.')?;
    if id.len() != 32 || !row.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((u128::from_str_radix(id, 16).ok()?, row.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Figures, GroupBy, SpendRow, Window};
    use proptest::prelude::*;

    const LIFETIME: Duration = Duration::from_secs(60);

    fn question(org: &str) -> Question {
        let query = SpendQuery {
            org: org.to_owned(),
            user: None,
            window: Window::Day,
            from: None,
            to: None,
            by: GroupBy::User,
            min_position: None,
        };
        Question { view: None, query }
    }

    fn answer(rows: usize) -> SpendAnswer {
        let row = |n| SpendRow {
            window_start: None,
            key: Some(format!("u{n}")),
            figures: Figures::default(),
        };
        SpendAnswer { rows: (0..rows).map(row).collect(), ..SpendAnswer::default() }
    }

    #[test]
    fn pages_cover_the_pinned_answer_once() {
        let (cursors, now) = (Cursors::new(LIFETIME, 100, ""), Instant::now());
        let mut page = cursors.first(question("a"), answer(10), 3, now).unwrap();
        let mut seen = vec![page.rows.clone()];
        while let Some(cursor) = &page.next_cursor {
            page = cursors.next(cursor, &question("a"), false, 4, now).unwrap();
            seen.push(page.rows.clone());
        }
        assert_eq!(seen, [0..3, 3..7, 7..10]);
    }

    #[test]
    fn a_cursor_names_its_node_and_belongs_to_it() {
        let now = Instant::now();
        let [a, b] = ["a", "b"].map(|node| Cursors::new(LIFETIME, 100, node));
        let cursor = a.first(question("o"), answer(10), 3, now).unwrap().next_cursor.unwrap();
        assert!(cursor.ends_with(".3.a"), "{cursor}");
        let next = a.next(&cursor, &question("o"), false, 3, now).unwrap().next_cursor.unwrap();
        assert!(next.ends_with(".6.a"), "{next}");
        for wrong in [cursor.as_str(), &cursor[..cursor.len() - 2]] {
            let problem = b.next(wrong, &question("o"), false, 3, now).unwrap_err();
            assert_eq!(problem.kind(), Kind::Parameter, "{wrong}");
        }
    }

    #[test]
    fn an_answer_that_fits_is_not_pinned() {
        let cursors = Cursors::new(LIFETIME, 100, "");
        let page = cursors.first(question("a"), answer(3), 3, Instant::now()).unwrap();
        assert_eq!((page.rows, page.next_cursor), (0..3, None));
        assert_eq!(cursors.kept.lock().rows, 0);
    }

    #[test]
    fn a_cursor_ends_after_its_lifetime() {
        let (cursors, now) = (Cursors::new(LIFETIME, 100, ""), Instant::now());
        let cursor = cursors.first(question("a"), answer(10), 3, now).unwrap().next_cursor.unwrap();
        let late = now + LIFETIME;
        let just = late - Duration::from_millis(1);
        assert!(cursors.next(&cursor, &question("a"), false, 3, just).is_ok());
        let problem = cursors.next(&cursor, &question("a"), false, 3, late).unwrap_err();
        assert_eq!(problem.kind(), Kind::CursorExpired);
        assert_eq!(cursors.kept.lock().rows, 0);
    }

    #[test]
    fn the_oldest_answers_make_room() {
        let (cursors, now) = (Cursors::new(LIFETIME, 25, ""), Instant::now());
        let pin =
            |org| cursors.first(question(org), answer(10), 3, now).unwrap().next_cursor.unwrap();
        let (a, b, c) = (pin("a"), pin("b"), pin("c"));
        let gone = cursors.next(&a, &question("a"), false, 3, now).unwrap_err();
        assert_eq!(gone.kind(), Kind::CursorExpired);
        assert!(cursors.next(&b, &question("b"), false, 3, now).is_ok());
        assert!(cursors.next(&c, &question("c"), false, 3, now).is_ok());
        let problem = cursors.first(question("d"), answer(26), 3, now).unwrap_err();
        assert_eq!(problem.kind(), Kind::AnswerTooLarge);
        assert!(cursors.next(&b, &question("b"), false, 3, now).is_ok());
    }

    #[test]
    fn a_cursor_belongs_to_its_question() {
        let (cursors, now) = (Cursors::new(LIFETIME, 100, ""), Instant::now());
        let cursor = cursors.first(question("a"), answer(10), 3, now).unwrap().next_cursor.unwrap();
        let kind = |question: &Question, given| {
            cursors.next(&cursor, question, given, 3, now).map_err(|problem| problem.kind()).err()
        };
        let mut other = question("a");
        other.query.by = GroupBy::Model;
        assert_eq!(kind(&question("b"), false), Some(Kind::Parameter));
        assert_eq!(kind(&other, false), None);
        assert_eq!(kind(&other, true), Some(Kind::Parameter));
        let mut waiting = question("a");
        waiting.query.min_position = Some("0:1".parse().unwrap());
        assert_eq!(kind(&waiting, true), None);
        let view = Question { view: Some("v".into()), ..question("a") };
        assert_eq!(kind(&view, false), Some(Kind::Parameter));
    }

    proptest! {
        #[test]
        fn a_forged_cursor_is_refused(text in "([0-9a-f]{30,34}|.{0,40})(\\.[0-9+-]{0,25})?") {
            let cursors = Cursors::new(LIFETIME, 100, "");
            let now = Instant::now();
            cursors.first(question("a"), answer(10), 3, now).unwrap();
            prop_assert!(cursors.next(&text, &question("a"), false, 3, now).is_err());
        }
    }

    #[test]
    fn a_row_beyond_the_answer_is_refused() {
        let (cursors, now) = (Cursors::new(LIFETIME, 100, ""), Instant::now());
        let cursor = cursors.first(question("a"), answer(10), 3, now).unwrap().next_cursor.unwrap();
        let id = cursor.split_once('.').unwrap().0;
        for row in ["10", "18446744073709551615", "18446744073709551616", "", "+1"] {
            let forged = format!("{id}.{row}");
            let problem = cursors.next(&forged, &question("a"), false, 3, now).unwrap_err();
            assert_eq!(problem.kind(), Kind::Parameter, "{forged}");
        }
    }
}
