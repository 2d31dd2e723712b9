#[hopline::service]
trait Demo {
    async unsafe fn put(&self);
    async extern "C" fn get(&self);
    const async fn pop(&self);
}

fn main() {}
