//! Types and graphs on the processor, against sums that are written out.

use std::sync::Arc;

use ggml::{Backend, Device, Graph, Result, Scheduler, Shape, Store, Type};

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 % 17) as f32 - 8.0) / 8.0).collect()
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn scheduler() -> Result<Scheduler> {
    let mut cpu = Backend::new(Device::cpu()?)?;
    cpu.start_threads(2, &[])?;
    Scheduler::new(vec![cpu], 64)
}

#[test]
fn every_type_that_is_written_is_read() {
    let rows = floats(512);
    let importance = vec![1.0; 256];
    let mut n = 0;
    for ty in Type::all() {
        // Those that cannot do without importance make large tables first.
        let quantizer = ty.quantizer().filter(|q| !q.needs_importance());
        let Some(quantizer) = quantizer else { continue };
        let blocks = quantizer.quantize(&rows, 256, Some(&importance)).expect("whole rows");
        assert_eq!(blocks.len(), ty.row_bytes(512), "{}", ty.name());
        let mut back = vec![0.0; 512];
        assert!(ty.dequantize(&blocks, &mut back), "{}", ty.name());
        let error: f32 = rows.iter().zip(&back).map(|(a, b)| (a - b).powi(2)).sum();
        let size: f32 = rows.iter().map(|a| a.powi(2)).sum();
        assert!(error < 0.35 * size, "{}: {error} of {size}", ty.name());
        assert!(!ty.dequantize(&blocks[1..], &mut back), "{}", ty.name());
        n += 1;
    }
    assert!(n > 20, "{n} types");
}

#[test]
fn a_graph_multiplies_stored_weights_and_works_on_rows() -> Result<()> {
    let mut weights =
        Store::new(Device::cpu()?.buffer_type()?, &[Shape::matrix(Type::F32, 4, 3)], true)?;
    weights.set(0, 0, &bytes(&floats(12)));
    let mut graph = Graph::new(16)?;
    let w = graph.stored(&Arc::new(weights), 0);
    let x = graph.input(Shape::matrix(Type::F32, 4, 2));
    let y = graph.mul_mat(w, x);
    let y = graph.rows(y, |i, row| row.iter_mut().for_each(|x| *x += i as f32));
    graph.output(y);
    let mut scheduler = scheduler()?;
    scheduler.load(graph)?;
    for shift in [0.0, 1.0] {
        let input: Vec<f32> = (0..8).map(|i| i as f32 + shift).collect();
        scheduler.set(x, &bytes(&input))?;
        scheduler.run()?;
        let mut out = Vec::new();
        scheduler.get(y, &mut out)?;
        let w = floats(12);
        let dot = |t: usize, r: usize| (0..4).map(|i| w[r * 4 + i] * input[t * 4 + i]).sum::<f32>();
        let wanted: Vec<f32> = (0..6).map(|i| dot(i / 3, i % 3) + (i / 3) as f32).collect();
        assert_eq!(out, wanted);
    }
    Ok(())
}

#[test]
fn borrowed_bytes_are_weights() -> Result<()> {
    let mut all = vec![0; 3];
    all.extend(
        Type::F16.quantizer().expect("written").quantize(&floats(64), 32, None).expect("rows"),
    );
    struct Tail(Vec<u8>);
    impl AsRef<[u8]> for Tail {
        fn as_ref(&self) -> &[u8] {
            &self.0[3..]
        }
    }
    let store = Store::borrowed(Box::new(Tail(all)), Shape::matrix(Type::F16, 32, 2))?;
    let mut graph = Graph::new(16)?;
    let w = graph.stored(&Arc::new(store), 0);
    let x = graph.input(Shape::matrix(Type::F32, 32, 1));
    let y = graph.mul_mat(w, x);
    graph.output(y);
    let mut scheduler = scheduler()?;
    scheduler.load(graph)?;
    scheduler.set(x, &bytes(&[1.0; 32]))?;
    scheduler.run()?;
    let mut out = Vec::new();
    scheduler.get(y, &mut out)?;
    let sums: Vec<f32> = floats(64).chunks(32).map(|row| row.iter().sum()).collect();
    assert_eq!(out, sums);
    Ok(())
}
