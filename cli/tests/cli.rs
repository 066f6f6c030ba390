//! The command, run as a process.

use std::process::{Command, Output};

use serde_json::Value;

fn halite(args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_halite")).args(args.split_whitespace()).output().unwrap()
}

fn text(args: &str) -> String {
    let output = halite(args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bench_reports_each_combination() {
    let args = "bench -p 8,0 -n 3 -d 0,70 -t 1,2 -r 3 --no-roofline";
    let rows: Value = serde_json::from_str(&text(&format!("{args} -o json"))).unwrap();
    let rows = rows.as_array().unwrap();
    let tests: Vec<_> =
        rows.iter().map(|row| (row["device"].as_str().unwrap(), row["test"].as_str().unwrap())).collect();
    let each = ["pp8", "tg3", "pp8 @ d70", "tg3 @ d70"];
    let names: Vec<_> = tests.iter().map(|(_, test)| *test).collect();
    assert_eq!(names, [each, each].concat());
    assert!(tests[..4].iter().all(|(device, _)| device.ends_with("on 1 thread")));
    assert!(tests[4..].iter().all(|(device, _)| device.ends_with("on 2 threads")));
    for row in rows {
        let seconds: Vec<f64> =
            row["seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        assert_eq!(seconds.len(), 3);
        let tokens = row["prompt_tokens"].as_f64().unwrap() + row["generated_tokens"].as_f64().unwrap();
        let mut speeds: Vec<f64> = seconds.iter().map(|s| tokens / s).collect();
        speeds.sort_by(f64::total_cmp);
        let close = |name: &str, expected: f64| {
            let got = row[name].as_f64().unwrap();
            assert!((got / expected - 1.0).abs() < 1e-9, "{name}: expected {expected}, got {got}");
        };
        close("median_tokens_per_s", speeds[1]);
        close("mean_tokens_per_s", speeds.iter().sum::<f64>() / 3.0);
        assert!(row["roofline_percent"].is_null());
        // The CPU has no clock but the host's.
        assert!(row["clock"] == "host" && row["seconds"] == row["host_seconds"], "{row}");
    }
    // A token that is generated reads all weights, a prompt's share them; what is in the cache costs more.
    let bytes = |i: usize| rows[i]["bytes_per_token"].as_u64().unwrap();
    let weights = rows[0]["weight_bytes"].as_u64().unwrap();
    assert!(bytes(1) > weights / 2 && bytes(0) < bytes(1) / 7 && bytes(3) > bytes(1));

    let csv = text(&format!("{args} -o csv"));
    let fields: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
    assert!(fields.len() == 9 && fields.iter().all(|&n| n == fields[0]), "{csv}");
    let table = text(args);
    let cells: Vec<usize> = table.lines().map(|line| line.split('|').count()).collect();
    assert!(cells.len() == 10 && cells.iter().all(|&n| n == 15), "{table}");
}

/// The model may be larger than what it may take; single ops have no such limit.
#[test]
fn bench_keeps_to_a_limit_on_memory() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/austen/halite-austen.gguf");
    let args = format!("bench --memory 64 -m {model} -p 8 -n 2 -r 1 --no-roofline");
    let rows: Value = serde_json::from_str(&text(&format!("{args} -o json"))).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 2);
    let refused = halite(&format!("bench --memory 1 -m {model} -p 8 -n 2"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("out of memory"), "{refused:?}");
    let refused = halite("bench --ops --memory 64");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--memory limits whole models"), "{refused:?}");
}

#[test]
fn export_writes_an_image_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let image = image.display();
    let printed = text(&format!("export {image} --ctx 64"));
    let bytes = std::fs::read(image.to_string()).unwrap();
    assert_eq!(&bytes[..4], b"HMIC");
    let stated = printed.split_whitespace().nth(1).unwrap();
    assert_eq!(stated.parse::<usize>().unwrap(), bytes.len(), "{printed}");
    let refused = halite(&format!("export {image} --ctx 32"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("not written"), "{refused:?}");
    assert_eq!(std::fs::read(image.to_string()).unwrap(), bytes);
    let refused = halite(&format!("export {image}.2 --ctx 513"));
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(message.contains("context: expected 1 to 512"), "{message}");
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing is left behind");
}

/// A simulated chip's time is the chip's, as `run` reports it, and not that of the host that simulates it.
#[cfg(feature = "sim")]
#[test]
fn bench_takes_the_clock_of_the_backend() {
    let json = |args: &str| -> Value { serde_json::from_str(&text(args)).unwrap() };
    let backend = "--backend sim:maia-100";
    let run = json(&format!("run {backend} --json --ignore-end --temp 0 -n 6 Once_upon_a_time"));
    let prompt = run["prompt_tokens"].as_array().unwrap().len();
    // The first of the six tokens comes with the prompt; the others are steps behind it.
    let rows = json(&format!("bench {backend} -p {prompt} -n 0 -r 1 --no-roofline -o json"));
    let decode = json(&format!("bench {backend} -p 0 -n 5 -d {prompt} -r 2 --no-roofline -o json"));
    for (row, seconds, tokens) in
        [(&rows[0], "device_prefill_s", prompt as f64), (&decode[0], "device_decode_s", 5.0)]
    {
        assert!(row["clock"] == "simulated" && row["seconds"][0] != row["host_seconds"][0], "{row}");
        let expected = tokens / run[seconds].as_f64().unwrap();
        let got = row["median_tokens_per_s"].as_f64().unwrap();
        // At temperature 0, `run` takes the same steps; times are whole nanoseconds.
        assert!((got / expected - 1.0).abs() < 1e-3, "{seconds}: expected {expected}, got {got}");
    }
    // Simulated time does not vary.
    assert_eq!(decode[0]["seconds"][0], decode[0]["seconds"][1]);
}

#[test]
fn bench_times_single_ops() {
    let json = |args: &str| -> Value { serde_json::from_str(&text(args)).unwrap() };
    let args = "bench --ops --tokens 1,4 -d 70 --seconds 0.001 --cold-mib 1 --no-roofline";
    let document = json(&format!("{args} -t 1 -o json"));
    assert!(document["backend"] == "cpu" && document["clock"] == "host", "{document}");
    assert!(document["ceilings"]["launch_seconds"].as_f64().unwrap() > 0.0);
    assert!(document["machine"]["architecture"].is_string() && document["gaps"] == Value::Array(vec![]));
    let rows = document["ops"].as_array().unwrap();
    let of = |op: &str, name: &str| -> Vec<&Value> {
        rows.iter().filter(|row| row["op"] == op && row["name"] == name).collect()
    };
    // Layers are alike: each op was timed once. Its weights come from memory, or from a cache.
    let products = of("MatMul", "attn_q+attn_k+attn_v");
    let seen: Vec<_> = products
        .iter()
        .map(|row| (row["tokens"].as_u64().unwrap(), row["cache"].as_str().unwrap()))
        .collect();
    assert_eq!(seen, [(1, "cold"), (1, "warm"), (4, "cold"), (4, "warm")]);
    let layers = products[0]["count"].as_u64().unwrap();
    assert!(layers > 1 && of("Attend", "attend")[0]["count"] == layers, "{document}");
    assert_eq!(products[0]["operations"].as_u64().unwrap() * 4, products[2]["operations"].as_u64().unwrap());
    // Each token reads the cache to its depth.
    assert_eq!(of("Attend", "attend")[0]["kv_bytes"].as_u64().unwrap() % 71, 0);
    // An op on outputs has one row in any step.
    assert!(of("ArgMax", "argmax").iter().all(|row| row["tokens"] == 1));
    for row in rows {
        assert!(row["seconds"].as_f64().unwrap() > 0.0 && row["bytes"].as_u64().unwrap() > 0, "{row}");
        assert!(row["roofline_percent"].is_null() && row["clock"] == "host", "{row}");
    }

    let csv = text(&format!("{args} -t 1 -o csv"));
    let lines = rows.len() + 1;
    assert!(csv.lines().count() == lines && csv.starts_with("op,name,format,shape,tokens,"), "{csv}");
    let table = text(&format!("{args} -t 1"));
    let cells = table.lines().filter(|line| line.starts_with('|')).map(|line| line.split('|').count());
    assert!(cells.clone().count() == lines + 1 && cells.clone().all(|n| n == 18), "{table}");

    // Ops of a shape without weights, and ops of no model.
    let rows = json(&format!("{args} -m tiny-moe --format q4_k --tokens 2 -o json"))["ops"].clone();
    let experts = rows.as_array().unwrap().iter().find(|row| row["op"] == "Experts").unwrap();
    assert!(experts["format"] == "Q4_K" && experts["shape"] == "2 of 4 256x256", "{experts}");
    let args = "bench --op matmul,attend --format q4_k,mxfp4 --shape 256x64 --heads 4/2x32 --tokens 1 --cold-mib 1 --seconds 0.001 --no-roofline";
    let document = json(&format!("{args} --depth 100 -o json"));
    let rows = document["ops"].as_array().unwrap();
    let seen: Vec<_> = rows
        .iter()
        .filter(|row| row["cache"] == "warm")
        .map(|row| (row["format"].as_str().unwrap(), row["shape"].as_str().unwrap()))
        .collect();
    assert_eq!(seen, [("Q4_K", "256x64"), ("MXFP4", "256x64"), ("F16", "4/2x32")]);
    for (wrong, said) in [
        ("bench --op conv", "expected matmul, attend, norm, glu, add or argmax"),
        ("bench --shape 4x4", "--ops"),
        ("bench --ops -t 1,2", "one number of threads"),
        ("bench --op matmul --format q9", "q4_k"),
    ] {
        let output = halite(wrong);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(said), "{wrong}: {error}");
    }
}

/// A card of a simulated chip, one of the CPU, and what is between them.
#[cfg(feature = "sim")]
#[test]
fn cards_compare_devices() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (cpu, sim, mine) = (file("cpu.json"), file("sim.json"), file("mine.html"));
    std::fs::write(&mine, "mine").unwrap();
    let args =
        "bench --op matmul --format q8_0 --shape 256x64 --tokens 1,2 --cold-mib 1 --seconds 0.001 -o json";
    let bench = file("bench.json");
    std::fs::write(&bench, text("bench -p 2 -n 2 -r 1 -t 1 --no-roofline -o json")).unwrap();
    std::fs::write(&cpu, text(&format!("{args} --no-roofline"))).unwrap();
    let page = file("sim.html");
    let chip = text(&format!("{args} --backend sim:maia-100 --card {page} --card-bench {bench}"));
    std::fs::write(&sim, &chip).unwrap();
    let chip: Value = serde_json::from_str(&chip).unwrap();
    assert!(chip["clock"] == "simulated" && chip["ceilings"]["by"] == "kernels", "{chip}");
    for name in
        ["read_bytes_per_s", "copy_bytes_per_s", "integer_ops_per_s", "float_ops_per_s", "launch_seconds"]
    {
        assert!(chip["ceilings"][name].as_f64().unwrap() > 0.0, "{name}");
    }
    // Simulated time depends on nothing: one row for each step.
    let rows = chip["ops"].as_array().unwrap();
    assert!(rows.len() == 2 && rows.iter().all(|row| row["cache"] == "cold" && row["clock"] == "simulated"));
    let written = std::fs::read_to_string(&page).unwrap();
    for expected in
        ["<!DOCTYPE html>", "<svg", "simulated", "by its own kernels", "tg2", "measured by the host"]
    {
        assert!(written.contains(expected), "{expected}\n{written}");
    }

    let table = text(&format!("card --compare {sim} {sim}"));
    assert!(
        table.lines().any(|line| line.starts_with("| decode.q8_0.us |") && line.ends_with("| 1.00 |")),
        "{table}"
    );
    text(&format!("card --compare {cpu} {sim} -o {}", file("both.html")));
    text(&format!("card {sim} -o {}", file("sim.svg")));
    text(&format!(
        "card --compare {sim} {sim} --assert decode.q8_0.gbps>=0.9*baseline --assert ceilings.launch_us>0"
    ));
    for (args, said) in [
        (format!("card --compare {sim} {sim} --assert decode.q8_0.gbps>1.5*baseline"), "assertions failed"),
        (
            format!("card --compare {sim} {cpu} --assert ceilings.read_gbps>0"),
            "it has ceilings.launch_us, decode.matmul.gbps",
        ),
        (format!("card {sim} --assert decode.us=1"), "expected >=, <=, > or <"),
        (format!("card {sim} {cpu}"), "--compare"),
        (format!("card {bench}"), "expected the results of `halite bench --ops -o json`"),
        (format!("card {sim} -o {cpu}"), ".html or .svg"),
        (format!("card {sim} -o {mine}"), "is not an HTML page"),
        (format!("bench --op add --card {mine}"), "is not an HTML page"),
    ] {
        let output = halite(&args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(said), "{args}: {error}");
    }
}

#[test]
fn bench_decodes_sequences_together() {
    let args = "bench -p 4 -n 3 -s 1,3 -d 0,70 -t 1 -r 1 --no-roofline -o json";
    let rows: Value = serde_json::from_str(&text(args)).unwrap();
    let tests: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(tests, ["pp4", "tg3", "tg3 x 3", "pp4 @ d70", "tg3 @ d70", "tg3 x 3 @ d70"]);
    let (one, three) = (&rows[4], &rows[5]);
    assert_eq!((one["sequences"].as_u64(), three["sequences"].as_u64()), (Some(1), Some(3)));
    let bytes = |row: &Value| row["bytes_per_token"].as_u64().unwrap();
    assert!(bytes(three) < bytes(one), "sequences share the weights");
    let rate =
        |row: &Value| row["median_tokens_per_s"].as_f64().unwrap() * row["seconds"][0].as_f64().unwrap();
    assert_eq!(rate(three).round(), 9.0, "tokens of all sequences count");
    assert!(!halite("bench -n 1 -s 0").status.success());
}

#[test]
fn bench_measures_the_machine() {
    let rows: Value = serde_json::from_str(&text("bench -p 16 -n 0 -t 1 -r 1 -o json")).unwrap();
    for name in ["bytes_per_s", "ops_per_s", "integer_ops_per_s", "float_ops_per_s", "percent"] {
        assert!(rows[0][format!("roofline_{name}")].as_f64().unwrap() > 0.0, "{name}");
    }
}

#[test]
fn synth_writes_what_runs_and_overwrites_nothing() {
    let dir = std::env::temp_dir().join(format!("halite-cli-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("tiny.gguf");
    let args = format!("synth tiny {} --format q4_k --output-format q6_k", file.display());
    text(&args);
    let before = std::fs::read(&file).unwrap();
    assert!(!text(&format!("run -m {} hi -n 4", file.display())).is_empty());
    let again = halite(&args);
    assert!(!again.status.success() && std::fs::read(&file).unwrap() == before);
    // A mistake leaves no file behind.
    let other = dir.join("other.gguf");
    let failed = halite(&format!("synth tiny {} --format i8", other.display()));
    assert!(!failed.status.success() && !other.exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[cfg(feature = "sim")]
#[test]
fn profile_prints_rates_and_names_faults() {
    let shown = text("profile maia-100 --numbers");
    assert!(shown.contains("of them change no time and no energy"), "{shown}");
    assert!(shown.contains(", no effect: memories are simulated without conflicts of banks"), "{shown}");
    for expected in [
        "64 tiles in 16 clusters at 1.43 GHz, driver sim",
        "hbm                    64 GB            1.8 TB/s",
        "mx9 x mx9                           1.499 P",
        "70 %)",
        "memory.hbm.read_bytes_per_s = 1800000000000.0 [datasheet: Microsoft, Inside Maia 100",
    ] {
        assert!(shown.contains(expected), "{expected}\n{shown}");
    }
    assert_eq!(text("profile").lines().count(), halite_profiles::profile::SHIPPED.len());
    let schema: Value = serde_json::from_str(&text("profile --schema")).unwrap();
    assert_eq!(schema["title"], "Profile");

    let file = std::env::temp_dir().join(format!("halite-profile-{}.toml", std::process::id()));
    let teaching = include_str!("../../hw-profiles/teaching-16x16.toml");
    std::fs::write(&file, teaching.replace("clock_hz = 1e9", "clock_hz = 1")).unwrap();
    let output = halite(&format!("profile {}", file.display()));
    std::fs::remove_file(&file).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("chip.clock_hz = 1.0 Hz: expected from"), "{error}");
    let output = halite("profile nothing");
    assert!(String::from_utf8(output.stderr).unwrap().contains("maia-100"));
}

/// An option that a backend does not have is an error that names both.
#[cfg(all(feature = "gpu", feature = "sim"))]
#[test]
fn options_are_their_backends() {
    for (backend, option, of) in [
        ("cpu", "--device-memory 64", "gpu"),
        ("reference", "--cooperative", "gpu"),
        ("sim:teaching-16x16", "--shader-cache folder", "gpu"),
        ("cpu", "--products int8", "sim"),
        ("template", "--numerics exact", "sim"),
        ("cpu", "--inject bitflip:rate=0,where=dram", "sim"),
        ("gpu", "--threads 1", "cpu"),
    ] {
        let output = halite(&format!("run --backend {backend} {option} -n 1 hello"));
        assert!(!output.status.success());
        let name = option.split(' ').next().unwrap();
        let said = format!("halite: backend `{backend}`: has no option {name}; it is an option of {of}\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), said);
    }
    let output = halite("run --backend tpu hello");
    let said = "halite: backend `tpu`: no such backend; expected cpu, reference, template, gpu, plugin:FILE[:OPTIONS] \
                or sim:PROFILE, of which `halite devices` lists those of this machine\n";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), said);
}

/// A command ends with the faults that were injected, whether it fails or not.
#[cfg(feature = "sim")]
#[test]
fn injected_faults_are_reported() {
    let conform = |rate| {
        let faults = format!("bitflip:rate={rate},where=dram;stuck:lane=0,where=accumulator");
        halite(&format!("conform --backend sim:teaching-16x16 --filter Glu --inject {faults}"))
    };
    let output = conform("0");
    let said = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let [dram, stuck, ..] = lines[..] else { panic!("{said}") };
    assert!(dram.starts_with("injected: bit flips in dram at rate 0e0: 0 of "), "{said}");
    assert!(stuck.starts_with("injected: lane 0 of accumulator in all tiles, stuck at zero: "), "{said}");
    let output = conform("1e-2");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.starts_with("injected: bit flips in dram at rate 1e-2: "),
        "{said}"
    );
    assert!(said.ends_with("halite: conformance failed\n") && !said.contains(": 0 of"), "{said}");
}

/// Results have the same checksums on each backend that is exact, and other backends have none.
#[cfg(feature = "sim")]
#[test]
fn results_of_cases_have_checksums() {
    let checksums = |backend: &str| halite(&format!("conform --checksums --filter Add --backend {backend}"));
    let want = checksums("reference");
    assert!(want.status.success());
    let text = String::from_utf8(want.stdout.clone()).unwrap();
    let names: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert!(names.len() >= 5 && names.iter().all(|name| name.contains("Add")), "{text}");
    let mut sums: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().0).collect();
    sums.sort_unstable();
    sums.dedup();
    assert_eq!(sums.len(), names.len(), "{text}");
    for backend in ["cpu", "sim:teaching-16x16"] {
        assert_eq!(checksums(backend).stdout, want.stdout, "{backend}");
    }
    let output = checksums("sim:maia-100 --numerics native");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("contract native have no checksums"), "{said}");
}

#[cfg(feature = "sim")]
#[test]
fn estimate_explains_itself() {
    let folder = std::env::temp_dir().join(format!("halite-estimate-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (trace, plot) = (folder.join("step.json"), folder.join("step.svg"));
    let shown = text(&format!(
        "estimate -m llama-1.1b -p maia-100,tpu-v1 --batch 2 --ops --trace {} --roofline {}",
        trace.display(),
        plot.display()
    ));
    for expected in
        ["time to first token", "share of guesses", "memory.hbm", "MatMul ffn_down", "uncalibrated"]
    {
        assert!(shown.contains(expected), "{expected}\n{shown}");
    }
    let events: Value = serde_json::from_str(&std::fs::read_to_string(&trace).unwrap()).unwrap();
    let ops = events.as_array().unwrap().iter().filter(|e| e["pid"] == 0 && e["ph"] == "X");
    // The ops of all layers follow each other.
    let ends: Vec<f64> = ops.map(|e| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap()).collect();
    assert!(ends.len() > 200 && ends.is_sorted(), "{}", ends.len());
    assert!(std::fs::read_to_string(&plot).unwrap().contains("mx9 x mx9"));
    std::fs::remove_dir_all(&folder).unwrap();
    let json: Value =
        serde_json::from_str(&text("estimate -m llama-2-7b -p maia-200 --format mxfp4 --json")).unwrap();
    assert!(json[0]["fits"] == true && json[0]["tokens_per_s"].as_f64().unwrap() > 1.0, "{json}");
    assert!(json[0]["is_calibrated"] == false && json[0]["mean_error_fraction"].is_null(), "{json}");
    // What does not fit has no speed; a chip without measurements does not hide the others.
    // Where nothing fits, the answer is told, and the command fails.
    let output =
        halite("estimate -m llama-2-70b -p maia-100,nvidia-h100,jetson-orin-nano-super --format bf16 --json");
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("weights and cache do not fit: expected at"));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json[0]["fits"] == false && json[0]["tokens_per_s"].is_null() && json[0]["step_s"].is_null());
    assert!(json[1]["mean_error_fraction"].as_f64().unwrap() > 0.0 && json[1]["is_calibrated"] == true);
    assert!(json[2]["is_calibrated"] == false && json[2]["fits"] == false, "{}", json[2]);
    assert!(
        json[2]["unmeasured"][0].as_str().unwrap().contains("uncalibrated, assumed to reach"),
        "{}",
        json[2]
    );
    let with = "--format bf16 --products fp8_e4m3";
    let output = halite(&format!("estimate -m llama-2-70b -p nvidia-h100,jetson-orin-nano-super {with}"));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        !output.status.success()
            && shown.contains("DOES NOT FIT")
            && shown.contains("no estimate, see below"),
        "{shown}"
    );
    let output = halite(&format!("estimate -m llama-2-70b -p jetson-orin-nano-super {with}"));
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("expected int8, fp16, got fp8_e4m3"));
    for (command, expected) in [
        ("-m llama-0 -p maia-100", "mixtral-8x7b"),
        (
            "-m llama-1.1b -p maia-100 --prompt 8000 --generate 193",
            "context of 8192 tokens together, got 8000",
        ),
        (
            "-m ../tests/data/golden/encoders/jina-bert-v3.gguf -p maia-100 --prompt 8 --generate 8",
            "expected one that generates text",
        ),
        ("-m llama-1.1b -p maia-100 --tp 2 --ep 2", "the model has no experts"),
        ("-m llama-1.1b -p maia-100 --chips 2 --best speed", "expected one of tokens_per_s, "),
    ] {
        let said = String::from_utf8(halite(&format!("estimate {command}")).stderr).unwrap();
        assert!(said.contains(expected), "{command}: {said}");
    }
}

#[cfg(feature = "sim")]
#[test]
fn exchanges_and_parts_of_a_batch_are_told() {
    let shown = text(
        "estimate -m llama-1.1b -p maia-100 --chips 4 --tp 2 --pp 2 --batch 4 --ops --best tokens_per_s",
    );
    let sums = shown.lines().filter(|line| line.trim_start().starts_with("all-reduce"));
    let sums: Vec<&str> = sums.collect();
    assert!(sums.len() == 2 && sums.iter().all(|line| line.contains(" links ")), "{shown}");
    assert!(!sums.iter().any(|line| line.ends_with(" 0 B")), "{shown}");
    assert!(shown.contains("decode step of 2 sequences, one of the 2 parts that"), "{shown}");
    let shown = text("estimate -m llama-1.1b -p maia-100 --chips 4 --batch 8 --best tokens_per_s");
    assert!(shown.contains("by --best tokens_per_s: the most of those that fit"), "{shown}");
    // Numbers that are out of the ordinary stay short.
    let shown = text("estimate -m tiny -p maia-100 --format f16 --prompt 1 --generate 1 --batch 4096");
    assert!(shown.lines().all(|line| line.chars().count() < 100), "{shown}");
}

/// A page has the figures of all chips, and of simulated ones a layer on a tile and a roofline.
#[test]
fn chips_are_compared_on_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("chips.html");
    let base =
        "estimate -m llama-1.1b -p maia-100,nvidia-h100,teaching-16x16 --batch 2 --prompt 64 --generate 8";
    text(&format!("{base} --html {}", page.display()));
    let html = std::fs::read_to_string(&page).unwrap();
    for part in [
        "<!DOCTYPE html>",
        "maia-100, nvidia-h100, teaching-16x16",
        "decode step, less is better",
        "MatMul ffn_down",
    ] {
        assert!(html.contains(part), "{part}");
    }
    assert_eq!(html.matches("A layer of a decode step (blk.11)").count(), 2);
    assert_eq!(html.matches("<svg").count(), 2);
    // Each lane says how long its unit works, and no picture is wider than its layer.
    assert!(html.contains("matrix ") && !html.contains("NaN") && !html.contains("inf"));
    let same = folder.path().join("same");
    let failed = halite(&format!("{base} --html {0} --roofline {0}", same.display()));
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stderr).contains("--roofline and --html: expected two files"));
}

#[cfg(feature = "sim")]
#[test]
fn designs_are_explored() {
    let folder = tempfile::tempdir().unwrap();
    let (table, page) = (folder.path().join("points.csv"), folder.path().join("designs.html"));
    let base = "explore -m llama-1.1b -p maia-100 --format bf16 --vary memory.hbm.read_bytes_per_s=1e12..8e12/4 --vary chips=1,2";
    let shown = text(&format!("{base} --csv {} --html {}", table.display(), page.display()));
    assert!(shown.contains("maia-100: 8 points, 8 have figures") && shown.contains("2: tp 2"), "{shown}");
    let json: Value = serde_json::from_str(&text(&format!("{base} --json"))).unwrap();
    let front = json["front"].as_array().unwrap();
    assert!(front.len() >= 3 && json["objectives"][1]["name"] == "memory.hbm.read_bytes_per_s", "{json}");
    // The same points in the table of all.
    let written = std::fs::read_to_string(&table).unwrap();
    let mut rows = csv::Reader::from_reader(written.as_bytes());
    let headers = rows.headers().unwrap().clone();
    let column = |name: &str| headers.iter().position(|header| header == name).unwrap();
    let (best, speed) = (column("front"), column("tokens_per_s"));
    let rows: Vec<csv::StringRecord> = rows.records().map(Result::unwrap).collect();
    assert_eq!((rows.len(), rows.iter().filter(|row| &row[best] == "1").count()), (8, front.len()));
    for point in front {
        let row = &rows[point["point"].as_u64().unwrap() as usize];
        assert_eq!(row[speed].parse::<f64>().unwrap(), point["tokens_per_s"].as_f64().unwrap());
    }
    // The page is whole by itself: a plot, a row for each point of the front, nothing from elsewhere.
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("<svg") && !page.contains("http-equiv") && !page.contains("src="), "{page}");
    assert_eq!(page.matches("<tr>").count(), front.len() + 1);
    // What does not fit is counted.
    let shown =
        text("explore -m llama-1.1b -p maia-100 --format bf16 --vary memory.hbm.capacity_bytes=1e9,64e9");
    assert!(shown.contains("2 points, 1 have figures\n  1 do not: weights and cache need "), "{shown}");
    let shown = text("explore -m llama-1.1b -p maia-100 --format bf16 --reach tokens_per_s=500");
    for expected in [
        "target 500.0",
        "memory.hbm.read_bytes_per_s",
        "not by this number alone: at best ",
        "by all of them together",
    ] {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    for (command, expected) in [
        ("--vary memory.hbm.read_bytes=1", "memory.hbm.read_bytes_per_s"),
        ("--vary chip.clusters=4..8/0", "values after the /"),
        ("--vary chip.clusters=1..64/9 --points 8", "at most 8; sample"),
        ("", "--vary"),
        ("--vary batch=1,2 --pareto speed,batch", "tokens_per_s, "),
        ("--vary batch=1,2 --pareto usd_per_million_tokens,batch", "whose numbers the profile has"),
        ("--vary batch=1,2 --pareto batch", "two or three names, got 1"),
        ("--reach speed=3", "expected NAME=NUMBER"),
        ("--reach usd_per_million_tokens=1", "no [price]"),
        ("--vary batch=1,2 --batch 3", "--batch and --vary batch"),
        ("--vary memory.hbm.capacity_bytes=1e6,2e6", "no point has figures"),
        ("--vary batch=1 --random 0", "not in 1.."),
    ] {
        let output = halite(&format!("explore -m llama-1.1b -p maia-100 {command}"));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(expected), "{command}\n{said}");
    }
}

#[cfg(feature = "sim")]
#[test]
fn loads_are_served() {
    let folder = std::env::temp_dir().join(format!("halite-load-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (trace, out) = (folder.join("trace.csv"), folder.join("out.csv"));
    // A line per rate, and the knee.
    let shown = text(
        "estimate -m llama-1.1b -p maia-100,coral-edge-tpu --format bf16 --load poisson:4..256 --requests 200 --lengths 500/uniform:20..40 --slo ttft=0.3",
    );
    let lines: Vec<&str> = shown.lines().collect();
    let knee: Vec<&&str> = lines.iter().filter(|line| line.starts_with("knee at ")).collect();
    assert!(
        knee.len() == 1 && knee[0].contains(" requests/s: up to it, 99 % of requests are within the SLO"),
        "{shown}"
    );
    assert_eq!(
        lines.iter().filter(|line| line.contains(" ms  ") || line.contains(" s  ")).count(),
        7,
        "{shown}"
    );
    // The one that cannot serve says why.
    assert!(shown.contains("\ncoral-edge-tpu\n  memory: expected room for a page"), "{shown}");
    std::fs::write(&trace, "arrival_s,prompt_tokens,generated_tokens\n0,100,8\n1.5,300,2\n").unwrap();
    let command =
        |more: &str| format!("estimate -m llama-1.1b -p maia-100 --load {} {more}", trace.display());
    let json = text(&command(&format!("--json --csv {}", out.display())));
    let json: Value = serde_json::from_str(&json).unwrap();
    let load = &json[0]["loads"][0];
    assert!(
        load["requests"] == 2 && load["rate_per_s"].is_null() && json[0]["knee_per_s"].is_null(),
        "{json}"
    );
    assert!(
        load["first_token_s"]["p99"].as_f64().unwrap() < 0.1 && load["good_fraction"].is_null(),
        "{json}"
    );
    // The same seconds in the table of requests: the longer prompt has the later first token.
    let written = std::fs::read_to_string(&out).unwrap();
    let cells: Vec<&str> = written.lines().last().unwrap().split(',').collect();
    assert!(cells[..4] == ["1.5", "300", "2", "0"] && cells[7] == "0", "{written}");
    let first_token_s = cells[5].parse::<f64>().unwrap() - 1.5;
    assert!((first_token_s / load["first_token_s"]["p99"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{written}");
    std::fs::write(&trace, "arrival_s,prompt_tokens,generated_tokens\n0,100,none\n").unwrap();
    for (command, expected) in [
        (command(""), "line 2, column generated_tokens"),
        (command("--lengths chat"), "--lengths: expected --load poisson:RATE"),
        (command("--requests 5"), "which has its own requests and lengths"),
        (command("--prompt 5"), "--prompt: expected --load poisson:RATE"),
        (command("--batch 2"), "cannot be used with"),
        ("estimate -m llama-1.1b -p maia-100 --seed 3".into(), "--load"),
        ("estimate -m llama-1.1b -p maia-100 --load poisson:0".into(), "rates above 0"),
        (
            "estimate -m llama-1.1b -p maia-100 --load poisson:1,2 --csv x.csv".into(),
            "one rate and one profile",
        ),
        ("estimate -m llama-1.1b -p maia-100 --load poisson:1 --prompt 9000".into(), "context of 8192"),
        (
            "estimate -m llama-1.1b -p maia-100 --load poisson:1 --context 9000".into(),
            "at most the model's 8192",
        ),
        ("estimate -m llama-2-70b -p maia-100 --load poisson:1 --format f16".into(), "bytes of weights"),
    ] {
        let output = halite(&command);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(expected), "{command}\n{said}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[cfg(feature = "sim")]
#[test]
fn calibrate_fits_measured_kernels() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../backends/sim/tests/data/silicon");
    let file = std::env::temp_dir().join(format!("halite-calibrate-{}.toml", std::process::id()));
    let args =
        format!("calibrate --profile tenstorrent-p150 --fit {folder}/p150-11x10.csv -o {}", file.display());
    let shown = text(&args);
    assert!(
        shown.contains("matmul, mxfp4 x mxfp4: fitted to 9 points") && shown.contains("wrote"),
        "{shown}"
    );
    let written = text(&format!("profile --numbers {}", file.display()));
    let other = halite(&format!("bench -p 1 -n 0 -t 1 --no-roofline --profile {}", file.display()));
    std::fs::remove_file(&file).unwrap();
    assert!(written.contains("calibration.matmul.2.compute_fraction"), "{written}");
    assert!(written.contains("points of p150-11x10.csv; errors of each shape"), "{written}");
    let error = String::from_utf8(other.stderr).unwrap();
    assert!(!other.status.success() && error.contains("[[calibration.host]] for 1 threads"), "{error}");
}

#[test]
fn a_text_in_instalments_is_the_text() {
    let file = std::env::temp_dir().join(format!("halite-saved-{}", std::process::id()));
    let json = |args: &str| -> Value { serde_json::from_str(&text(args)).unwrap() };
    let whole = json("run --temp 0 --ignore-end --json -n 24 Once");
    let (save, restore) = (format!("--save {}", file.display()), format!("--restore {}", file.display()));
    let first = json(&format!("run --temp 0 --ignore-end --json -n 10 --lookup 4 {save} Once"));
    // No prompt of its own: stdin is empty.
    let second = json(&format!("run --temp 0 --ignore-end --json -n 14 {restore}"));
    let saved = std::fs::read(&file).unwrap();
    json(&format!("run --temp 0 --ignore-end --json -n 2 {restore} {save}"));
    assert!(std::fs::read(&file).unwrap() != saved);
    std::fs::remove_file(&file).unwrap();
    let tokens = |v: &Value| v["tokens"].as_array().unwrap().clone();
    assert_eq!([tokens(&first), tokens(&second)].concat(), tokens(&whole));
    let got = second["prompt_tokens"].as_array().unwrap().len();
    assert_eq!(got, first["prompt_tokens"].as_array().unwrap().len() + 10);
}

#[cfg(unix)]
#[test]
fn chat_answers_each_line() {
    use std::io::Write;
    let file = std::env::temp_dir().join(format!("halite-chat-{}.jinja", std::process::id()));
    std::fs::write(&file, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_halite"))
        .args(["chat", "-n", "8", "--temp", "0", "--system", "Speak.", "--template"])
        .arg(&file)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Who was Emma?\n\nAnd then?\n").unwrap();
    let output = child.wait_with_output().unwrap();
    std::fs::remove_file(&file).unwrap();
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{notes}");
    let kept: Vec<u32> = notes
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.split_once(" tokens kept")?.0.parse().ok())
        .collect();
    assert!(kept.len() == 2 && kept[0] == 0 && kept[1] > 8, "{notes}");
    assert!(!output.stdout.is_empty());
    let output = halite("chat");
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("no chat template"));
}

/// File names are bytes: what is no text is shown as well as it can be, and opened as it is.
#[cfg(all(unix, feature = "sim"))]
#[test]
fn file_names_need_not_be_text() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let folder = std::env::temp_dir().join(format!("halite-names-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let name = |end: &str| folder.join(OsStr::from_bytes(&[b"b\xff\x1b[2J", end.as_bytes()].concat()));
    let model = name(".gguf");
    let run = |args: &[&OsStr]| {
        let output = Command::new(env!("CARGO_BIN_EXE_halite")).args(args).output().unwrap();
        let error = String::from_utf8(output.stderr.clone()).unwrap();
        assert!(!error.contains("panicked") && !error.contains('\u{1b}'), "{args:?}: {error}");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned(), error)
    };
    let words = |text: &str, files: &[&OsStr]| -> Vec<OsString> {
        let mut files = files.iter();
        let word = |word: &str| if word == "FILE" { files.next().unwrap().into() } else { word.into() };
        text.split(' ').map(word).collect()
    };
    let done = |text: &str, files: &[&OsStr]| {
        let args = words(text, files);
        let (success, out, error) = run(&args.iter().map(OsString::as_os_str).collect::<Vec<_>>());
        assert!(success, "{text}: {error}");
        out
    };
    done("synth tiny FILE --format q8_0", &[model.as_os_str()]);
    let report: Value = serde_json::from_str(&done("inspect --json FILE", &[model.as_os_str()])).unwrap();
    assert!(report["file"].as_str().unwrap().ends_with("b\u{fffd}\u{1b}[2J.gguf"), "{report}");
    assert!(!done("inspect FILE", &[model.as_os_str()]).contains('\u{1b}'));
    done("run -n 2 -m FILE hello", &[model.as_os_str()]);
    done("tokenize -m FILE hello", &[model.as_os_str()]);
    done("logits -m FILE --tokens 1,2 -o FILE", &[model.as_os_str(), name(".logits").as_os_str()]);
    done("run -n 2 -m FILE --save FILE hello", &[model.as_os_str(), name(".saved").as_os_str()]);
    done("pack FILE FILE", &[model.as_os_str(), name("-packed.gguf").as_os_str()]);
    done(
        "estimate -m FILE -p maia-100 --prompt 9 --generate 9 --trace FILE",
        &[model.as_os_str(), name(".json").as_os_str()],
    );
    done("bench -m FILE -p 2 -n 0 -r 1 --no-roofline -o json", &[model.as_os_str()]);

    // What cannot be opened is named, and no terminal does what it says.
    let absent = name("-absent.gguf");
    for args in [
        "inspect FILE",
        "run -m FILE hello",
        "run --lora FILE hello",
        "estimate -m FILE -p maia-100 --prompt 9 --generate 9",
        "embed -m FILE hello",
        "profile FILE",
        "convert FILE FILE",
        "run --restore FILE x",
        "perplexity -f FILE",
    ] {
        let args = words(args, &[absent.as_os_str(), name("-out").as_os_str()]);
        let (success, _, error) = run(&args.iter().map(OsString::as_os_str).collect::<Vec<_>>());
        assert!(!success && !error.is_empty(), "{args:?}: {error}");
    }
    // Nor does it wait for the other end of a pipe.
    let pipe = name(".pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for args in [
        "inspect FILE",
        "run -m FILE hello",
        "run --lora FILE hello",
        "embed -m FILE hello",
        "pack FILE FILE",
    ] {
        let args = words(args, &[pipe.as_os_str(), name("-out").as_os_str()]);
        let (success, _, error) = run(&args.iter().map(OsString::as_os_str).collect::<Vec<_>>());
        assert!(!success && error.contains("not a regular file"), "{args:?}: {error}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_halite"))
        .args(["run", "-n", "1", "hello"])
        .env("HALITE_ISA", OsStr::from_bytes(b"\xff"))
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("instruction set"), "{error}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn ids_beyond_the_vocabulary_are_named() {
    assert_eq!(text("tokenize --decode 5").lines().count(), 1);
    let output = halite("tokenize --decode 5,99999,99998");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{error}");
    let size =
        halite::Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/austen/halite-austen.gguf"))
            .unwrap();
    let size = halite::Tokenizer::from_gguf(size.gguf()).unwrap().unwrap().len();
    assert!(
        error.contains(&format!("token id: expected below {size}, ")) && error.contains("got 99999"),
        "{error}"
    );
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let file = std::env::temp_dir().join(format!("halite-bom-{}", std::process::id()));
    let run = |text: &str| -> Value {
        std::fs::write(&file, text).unwrap();
        serde_json::from_str(&self::text(&format!("run --temp 0 --json -n 1 -f {}", file.display()))).unwrap()
    };
    let (with, without) = (run("\u{feff}Emma"), run("Emma"));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(with["prompt_tokens"], without["prompt_tokens"]);
}

#[cfg(feature = "sim")]
#[test]
fn chips_without_four_bit_products_are_estimated() {
    let shown = text("estimate -m llama-2-7b -p maia-100,nvidia-h100");
    assert!(shown.contains("weights of Q4_0: products as measured in bf16"), "{shown}");
    assert!(shown.contains("unknown (formats not measured)"), "{shown}");
    let shown = text("estimate -m llama-2-7b -p nvidia-h100 --format bf16 --kv q8_0");
    assert!(shown.contains("KV cache of Q8_0: attention as measured in bf16"), "{shown}");
}

/// The checksums are those of `sha256sum`; of a model that is another nothing is run.
#[test]
fn a_model_is_held_to_its_checksums() {
    let folder = std::env::temp_dir().join(format!("halite-checksums-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (model, list) = (folder.join("model.gguf"), folder.join("list"));
    let mut bytes =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/austen/halite-austen.gguf")).unwrap();
    std::fs::write(&model, &bytes).unwrap();
    text(&format!("inspect {} --checksums {}", model.display(), list.display()));
    let written = std::fs::read_to_string(&list).unwrap();
    assert!(written.len() == 64 + 2 + 11 && written.ends_with("  model.gguf\n"), "{written}");
    #[cfg(target_os = "linux")]
    {
        let checked =
            Command::new("sha256sum").args(["--check", "list"]).current_dir(&folder).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }
    let again = halite(&format!("inspect {} --checksums {}", model.display(), list.display()));
    assert!(!again.status.success() && std::fs::read_to_string(&list).unwrap() == written);

    let run = |list: &std::path::Path| {
        let output =
            halite(&format!("run -n 2 -m {} --verify-on-load {} Emma", model.display(), list.display()));
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    assert!(run(&list).0);
    // Within a limit on memory, files are read and not mapped.
    let limited =
        format!("run -n 2 --memory 400 -m {} --verify-on-load {} Emma", model.display(), list.display());
    assert!(halite(&limited).status.success());
    let upper = folder.join("upper");
    std::fs::write(&upper, format!("comment\n{} *model.gguf\n", written[..64].to_uppercase())).unwrap();
    assert!(run(&upper).0);
    let (success, error) = run(&model);
    assert!(!success && error.contains("expected at most 1048576 bytes"), "{error}");
    std::fs::write(&upper, written.replace("model", "other")).unwrap();
    let (success, error) = run(&upper);
    assert!(!success && error.contains("no SHA-256 of model.gguf"), "{error}");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&model, &bytes).unwrap();
    let (success, error) = run(&list);
    let expected = format!("model.gguf: expected SHA-256 {}, got ", &written[..64]);
    assert!(!success && error.contains(&expected), "{error}");
    std::fs::remove_dir_all(&folder).unwrap();
}
