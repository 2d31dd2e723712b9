use hopline::{Context, Method, Service};

struct Full;

fn main() {
    let put = |_: Context, (_,): (u64,)| async move { Err::<(), _>(Full) };
    let _ = Service::new("store", 1).method(Method::new("put"), put);
}
