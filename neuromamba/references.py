"""BibTeX entries of the methods and programs that a run may use, by the key they are cited with."""

from __future__ import annotations

import re
from collections.abc import Collection

BIBTEX = r"""
@article{gorgolewski2016bids, author={Gorgolewski, Krzysztof J. and others},
  title={The Brain Imaging Data Structure, a format for organizing and describing outputs of neuroimaging experiments},
  journal={Scientific Data}, volume={3}, pages={160044}, year={2016}, doi={10.1038/sdata.2016.44}}
@article{esteban2019fmriprep, author={Esteban, Oscar and others},
  title={{fMRIPrep}: a robust preprocessing pipeline for functional {MRI}},
  journal={Nature Methods}, volume={16}, pages={111--116}, year={2019}, doi={10.1038/s41592-018-0235-4}}
@article{tustison2021antsx, author={Tustison, Nicholas J. and others},
  title={The {ANTsX} ecosystem for quantitative biological and medical imaging},
  journal={Scientific Reports}, volume={11}, pages={9068}, year={2021}, doi={10.1038/s41598-021-87564-6}}
@article{avants2008syn, author={Avants, Brian B. and Epstein, Charles L. and Grossman, Murray and Gee, James C.},
  title={Symmetric diffeomorphic image registration with cross-correlation: Evaluating automated labeling of elderly and neurodegenerative brain},
  journal={Medical Image Analysis}, volume={12}, number={1}, pages={26--41}, year={2008}, doi={10.1016/j.media.2007.06.004}}
@article{tustison2010n4, author={Tustison, Nicholas J. and others},
  title={{N4ITK}: Improved {N3} Bias Correction},
  journal={IEEE Transactions on Medical Imaging}, volume={29}, number={6}, pages={1310--1320}, year={2010}, doi={10.1109/TMI.2010.2046908}}
@article{fonov2011mni, author={Fonov, Vladimir and others},
  title={Unbiased average age-appropriate atlases for pediatric studies},
  journal={NeuroImage}, volume={54}, number={1}, pages={313--327}, year={2011}, doi={10.1016/j.neuroimage.2010.07.033}}
@article{abraham2014nilearn, author={Abraham, Alexandre and others},
  title={Machine learning for neuroimaging with scikit-learn},
  journal={Frontiers in Neuroinformatics}, volume={8}, pages={14}, year={2014}, doi={10.3389/fninf.2014.00014}}
@article{wang2024denoising, author={Wang, Hao-Ting and others},
  title={Continuous evaluation of denoising strategies in resting-state {fMRI} connectivity using {fMRIPrep} and {Nilearn}},
  journal={PLOS Computational Biology}, volume={20}, number={3}, pages={e1011942}, year={2024}, doi={10.1371/journal.pcbi.1011942}}
@article{lindquist2019filters, author={Lindquist, Martin A. and Geuter, Stephan and Wager, Tor D. and Caffo, Brian S.},
  title={Modular preprocessing pipelines can reintroduce artifacts into {fMRI} data},
  journal={Human Brain Mapping}, volume={40}, number={8}, pages={2358--2376}, year={2019}, doi={10.1002/hbm.24528}}
@article{behzadi2007compcor, author={Behzadi, Yashar and Restom, Khaled and Liau, Joy and Liu, Thomas T.},
  title={A component based noise correction method ({CompCor}) for {BOLD} and perfusion based {fMRI}},
  journal={NeuroImage}, volume={37}, number={1}, pages={90--101}, year={2007}, doi={10.1016/j.neuroimage.2007.04.042}}
@article{power2012motion, author={Power, Jonathan D. and Barnes, Kelly A. and Snyder, Abraham Z. and Schlaggar, Bradley L. and Petersen, Steven E.},
  title={Spurious but systematic correlations in functional connectivity {MRI} networks arise from subject motion},
  journal={NeuroImage}, volume={59}, number={3}, pages={2142--2154}, year={2012}, doi={10.1016/j.neuroimage.2011.10.018}}
@misc{cao2025bridging, author={Cao, Rui and Liu, Xiaobo and others},
  title={Bridging Foundation Models and Efficient Architectures: A Modular Brain Imaging Framework with Local Masking and Pretrained Representation Learning},
  year={2025}, url={https://arxiv.org/abs/2508.16597}}
@inproceedings{he2022mae, author={He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and Girshick, Ross},
  title={Masked Autoencoders Are Scalable Vision Learners},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2022}, url={https://arxiv.org/abs/2111.06377}}
@inproceedings{vaswani2017attention, author={Vaswani, Ashish and others}, title={Attention Is All You Need},
  booktitle={Advances in Neural Information Processing Systems}, volume={30}, year={2017}, url={https://arxiv.org/abs/1706.03762}}
@inproceedings{ortegacaro2024brainlm, author={Ortega Caro, Josue and others},
  title={{BrainLM}: A foundation model for brain activity recordings},
  booktitle={International Conference on Learning Representations}, year={2024}, url={https://www.biorxiv.org/content/10.1101/2023.09.12.557460v1}}
@inproceedings{hu2025cinp, author={Hu, Xingcan and Wang, Wei and Xiao, Li},
  title={Learning {3D} Medical Image Models From Brain Functional Connectivity Network Supervision For Mental Disorder Diagnosis},
  booktitle={Medical Image Computing and Computer Assisted Intervention}, year={2025}, url={https://arxiv.org/abs/2503.04205}}
@inproceedings{kim2026tablet, author={Kim, Peter Yongho and Park, Juhyeon and Park, Jungwoo and Choi, Jubin and Seo, Jungwoo and Cha, Jiook and Moon, Taesup},
  title={Can Natural Image Autoencoders Compactly Tokenize {fMRI} Volumes for Long-Range Dynamics Modeling?},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2026}, url={https://arxiv.org/abs/2604.03619}}
@inproceedings{chen2025dcae, author={Chen, Junyu and others},
  title={Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models},
  booktitle={International Conference on Learning Representations}, year={2025}, url={https://arxiv.org/abs/2410.10733}}
@inproceedings{ainslie2023gqa, author={Ainslie, Joshua and others},
  title={{GQA}: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints},
  booktitle={Conference on Empirical Methods in Natural Language Processing}, year={2023}, url={https://arxiv.org/abs/2305.13245}}
@article{su2024roformer, author={Su, Jianlin and others},
  title={{RoFormer}: Enhanced transformer with Rotary Position Embedding},
  journal={Neurocomputing}, volume={568}, pages={127063}, year={2024}, doi={10.1016/j.neucom.2023.127063}}
@inproceedings{tang2022swin, author={Tang, Yucheng and others},
  title={Self-Supervised Pre-Training of {Swin} Transformers for {3D} Medical Image Analysis},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2022}, url={https://arxiv.org/abs/2111.14791}}
@inproceedings{kan2022bnt, author={Kan, Xuan and Dai, Wei and Cui, Hejie and Zhang, Zilong and Guo, Ying and Yang, Carl},
  title={Brain Network Transformer}, booktitle={Advances in Neural Information Processing Systems}, year={2022}, url={https://arxiv.org/abs/2210.06681}}
@inproceedings{radford2021clip, author={Radford, Alec and others},
  title={Learning Transferable Visual Models From Natural Language Supervision},
  booktitle={International Conference on Machine Learning}, year={2021}, url={https://arxiv.org/abs/2103.00020}}
@inproceedings{li2021albef, author={Li, Junnan and others},
  title={Align before Fuse: Vision and Language Representation Learning with Momentum Distillation},
  booktitle={Advances in Neural Information Processing Systems}, year={2021}, url={https://arxiv.org/abs/2107.07651}}
@misc{cardoso2022monai, author={Cardoso, M. Jorge and others},
  title={{MONAI}: An open-source framework for deep learning in healthcare}, year={2022}, url={https://arxiv.org/abs/2211.02701}}
@inproceedings{choi2025neuromamba, author={Choi, Jubin and Park, David Keetae and Kwon, Junbeom and Yoo, Shinjae and Cha, Jiook},
  title={{NeuroMamba}: A State-Space Foundation Model for Functional {MRI}},
  booktitle={NeurIPS 2025 Workshop on Foundation Models for the Brain and Body}, year={2025}, url={https://openreview.net/forum?id=kftg4lmQi8}}
@inproceedings{dao2024mamba2, author={Dao, Tri and Gu, Albert},
  title={Transformers are {SSMs}: Generalized Models and Efficient Algorithms Through Structured State Space Duality},
  booktitle={International Conference on Machine Learning}, year={2024}, doi={10.48550/arXiv.2405.21060}}
@inproceedings{mildenhall2020nerf, author={Mildenhall, Ben and Srinivasan, Pratul P. and Tancik, Matthew and Barron, Jonathan T. and Ramamoorthi, Ravi and Ng, Ren},
  title={{NeRF}: Representing Scenes as Neural Radiance Fields for View Synthesis},
  booktitle={European Conference on Computer Vision}, year={2020}, doi={10.1007/978-3-030-58452-8_24}}
@article{yang2022mup, author={Yang, Greg and others},
  title={Tensor Programs {V}: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer},
  journal={arXiv}, year={2022}, doi={10.48550/arXiv.2203.03466}}
@inproceedings{loshchilov2019adamw, author={Loshchilov, Ilya and Hutter, Frank},
  title={Decoupled Weight Decay Regularization},
  booktitle={International Conference on Learning Representations}, year={2019}, doi={10.48550/arXiv.1711.05101}}
@inproceedings{hu2022lora, author={Hu, Edward J. and others},
  title={{LoRA}: Low-Rank Adaptation of Large Language Models},
  booktitle={International Conference on Learning Representations}, year={2022}, doi={10.48550/arXiv.2106.09685}}
@inproceedings{paszke2019pytorch, author={Paszke, Adam and others},
  title={{PyTorch}: An Imperative Style, High-Performance Deep Learning Library},
  booktitle={Advances in Neural Information Processing Systems}, year={2019}, doi={10.48550/arXiv.1912.01703}}
@article{pedregosa2011sklearn, author={Pedregosa, Fabian and others},
  title={Scikit-learn: Machine Learning in {Python}},
  journal={Journal of Machine Learning Research}, volume={12}, pages={2825--2830}, year={2011}, url={https://jmlr.org/papers/v12/pedregosa11a.html}}
@inproceedings{varoquaux2010tangent, author={Varoquaux, Ga{\"e}l and Baronnet, Flore and Kleinschmidt, Andreas and Fillard, Pierre and Thirion, Bertrand},
  title={Detection of Brain Functional-Connectivity Difference in Post-stroke Patients Using Group-Level Covariance Modeling},
  booktitle={Medical Image Computing and Computer-Assisted Intervention}, year={2010}, doi={10.1007/978-3-642-15705-9_25}}
@article{he2020kernel, author={He, Tong and others},
  title={Deep neural networks and kernel regression achieve comparable accuracies for functional connectivity prediction of behavior and demographics},
  journal={NeuroImage}, volume={206}, pages={116276}, year={2020}, doi={10.1016/j.neuroimage.2019.116276}}
@article{snoek2019confounds, author={Snoek, Lukas and Mileti{\'c}, Steven and Scholte, H. Steven},
  title={How to control for confounds in decoding analyses of neuroimaging data},
  journal={NeuroImage}, volume={184}, pages={741--760}, year={2019}, doi={10.1016/j.neuroimage.2018.09.074}}
@article{johnson2007combat, author={Johnson, W. Evan and Li, Cheng and Rabinovic, Ariel},
  title={Adjusting batch effects in microarray expression data using empirical {Bayes} methods},
  journal={Biostatistics}, volume={8}, number={1}, pages={118--127}, year={2007}, doi={10.1093/biostatistics/kxj037}}
@article{yu2018combat, author={Yu, Meichen and others},
  title={Statistical harmonization corrects site effects in functional connectivity measurements from multi-site {fMRI} data},
  journal={Human Brain Mapping}, volume={39}, number={11}, pages={4213--4227}, year={2018}, doi={10.1002/hbm.24241}}
@book{efron1993bootstrap, author={Efron, Bradley and Tibshirani, Robert J.},
  title={An Introduction to the Bootstrap}, publisher={Chapman and Hall/CRC}, year={1993}, doi={10.1201/9780429246593}}
@article{phipson2010permutation, author={Phipson, Belinda and Smyth, Gordon K.},
  title={Permutation {P}-values Should Never Be Zero: Calculating Exact {P}-values When Permutations Are Randomly Drawn},
  journal={Statistical Applications in Genetics and Molecular Biology}, volume={9}, number={1}, pages={39}, year={2010}, doi={10.2202/1544-6115.1585}}
@article{bandos2005auc, author={Bandos, Andriy I. and Rockette, Howard E. and Gur, David},
  title={A permutation test sensitive to differences in areas for comparing {ROC} curves from a paired design},
  journal={Statistics in Medicine}, volume={24}, number={18}, pages={2873--2893}, year={2005}, doi={10.1002/sim.2149}}
@article{holm1979, author={Holm, Sture},
  title={A Simple Sequentially Rejective Multiple Test Procedure},
  journal={Scandinavian Journal of Statistics}, volume={6}, number={2}, pages={65--70}, year={1979}, url={https://www.jstor.org/stable/4615733}}
@article{nadeau2003inference, author={Nadeau, Claude and Bengio, Yoshua},
  title={Inference for the Generalization Error},
  journal={Machine Learning}, volume={52}, pages={239--281}, year={2003}, doi={10.1023/A:1024068626366}}
@inproceedings{guo2017calibration, author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  title={On Calibration of Modern Neural Networks},
  booktitle={International Conference on Machine Learning}, year={2017}, doi={10.48550/arXiv.1706.04599}}
@inproceedings{sundararajan2017integrated, author={Sundararajan, Mukund and Taly, Ankur and Yan, Qiqi},
  title={Axiomatic Attribution for Deep Networks},
  booktitle={International Conference on Machine Learning}, year={2017}, doi={10.48550/arXiv.1703.01365}}
@inproceedings{adebayo2018sanity, author={Adebayo, Julius and others},
  title={Sanity Checks for Saliency Maps},
  booktitle={Advances in Neural Information Processing Systems}, year={2018}, doi={10.48550/arXiv.1810.03292}}
@article{finn2015fingerprint, author={Finn, Emily S. and others},
  title={Functional connectome fingerprinting: identifying individuals using patterns of brain connectivity},
  journal={Nature Neuroscience}, volume={18}, pages={1664--1671}, year={2015}, doi={10.1038/nn.4135}}
@article{kaplan2020scaling, author={Kaplan, Jared and others},
  title={Scaling Laws for Neural Language Models}, journal={arXiv}, year={2020}, doi={10.48550/arXiv.2001.08361}}
@article{hoffmann2022scaling, author={Hoffmann, Jordan and others},
  title={Training Compute-Optimal Large Language Models}, journal={arXiv}, year={2022}, doi={10.48550/arXiv.2203.15556}}
@article{molder2021snakemake, author={M{\"o}lder, Felix and others},
  title={Sustainable data analysis with {Snakemake}},
  journal={F1000Research}, volume={10}, pages={33}, year={2021}, doi={10.12688/f1000research.29032.2}}
"""  # noqa: E501

_ENTRIES = re.findall(r"(@\w+\{(\w+),.*?\}\}\n)", BIBTEX, re.DOTALL)
REFERENCES: dict[str, str] = {key: entry for entry, key in _ENTRIES}
"""Key -> entry."""


def cited_keys(text: str) -> list[str]:
    """The keys that a text cites as Pandoc does, `[@one; @other]`, in order and each once."""
    groups = re.findall(r"\[(@[^\]]+)\]", text)
    return list(dict.fromkeys(key for group in groups for key in re.findall(r"@(\w+)", group)))


def bibliography(keys: Collection[str]) -> str:
    """The entries of some keys as the text of a BibTeX file.

    Raises
    ------
    KeyError
        When a key has no entry.
    """
    return "\n".join(REFERENCES[key] for key in keys)
