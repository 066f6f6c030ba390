//! A ledger whose process is killed in the midst of writing.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use halite_server::ledger::{Durability, Entry, Ledger, Receipt, Writer};

/// The ledger of a child that writes; set only for such a child.
const CHILD: &str = "HALITE_TEST_LEDGER";

/// Writes receipts from several threads for ever, and prints those that are durable.
fn write(path: &Path) {
    let writer = Writer::new(Ledger::open(path, Durability::Full).unwrap()).unwrap();
    let start = Ledger::open_read_only(path).unwrap().receipts(0, u32::MAX).unwrap().len() as u64;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let writer = &writer;
            scope.spawn(move || {
                for n in 0.. {
                    let mut receipt = Receipt::default();
                    receipt.completion_tokens = (start + n) * 4 + thread;
                    receipt.client = "c".repeat(receipt.completion_tokens as usize % 1000);
                    let seq = writer.append_blocking(Entry::receipt(&receipt).unwrap()).unwrap();
                    println!("written {seq} {}", receipt.completion_tokens);
                }
            });
        }
    });
}

#[test]
fn a_killed_process_loses_no_receipt_that_it_confirmed() {
    if let Some(path) = std::env::var_os(CHILD) {
        write(path.as_ref());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut confirmed = BTreeSet::new();
    for lines in [1, 40, 150] {
        let test = "a_killed_process_loses_no_receipt_that_it_confirmed";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut seen = 0;
        // What is still in the pipe was confirmed, too.
        for line in out.lines().map_while(Result::ok) {
            // The test harness prints before the first one, on the same line.
            let Some((_, numbers)) = line.split_once("written ") else { continue };
            let Some((seq, tokens)) = numbers.split_once(' ') else { continue };
            confirmed.insert((seq.parse::<i64>().unwrap(), tokens.parse::<u64>().unwrap()));
            seen += 1;
            if seen == lines {
                child.kill().unwrap();
            }
        }
        assert!(!child.wait().unwrap().success());
        assert!(seen >= lines);

        let ledger = Ledger::open(&path, Durability::Full).unwrap();
        let verified = ledger.verify(None).unwrap();
        let stored = ledger.receipts(0, u32::MAX).unwrap();
        assert_eq!(verified.entries, stored.len() as u64);
        let usage = ledger.usage(&[], None, None).unwrap();
        let sum: u64 = stored.iter().map(|stored| stored.content.completion_tokens).sum();
        assert_eq!((usage[0].requests, usage[0].completion_tokens), (verified.entries, sum));
        let stored: BTreeSet<_> = stored.iter().map(|s| (s.seq, s.content.completion_tokens)).collect();
        assert!(confirmed.is_subset(&stored));
    }
}
