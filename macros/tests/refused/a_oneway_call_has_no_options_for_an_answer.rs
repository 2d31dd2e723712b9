use hopline::{Absent, Call, Oneway};

fn options(call: fn() -> Call<Oneway>) {
    // These have an effect on oneway calls too.
    let _ = call().priority(9).metadata("for", "whom").codec(hopline::Codec::Json).to("instance");
    let _ = call().idempotent();
    let _ = call().absent(Absent::Fail);
    let _ = call().fails_with::<String>();
}

fn main() {}
